"""The figures of all replicas in one text, each with the replica's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def join_metrics(texts: Mapping[str, str]) -> str:
    """One text in Prometheus' format.

    Args:
        texts: in the same format, by the value that the label `replica` gets.
    """
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return generate_latest(registry).decode()


class _Joined(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    joined.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
        yield from families.values()
