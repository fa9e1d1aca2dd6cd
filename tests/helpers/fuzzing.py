"""How much is tried: a little in the suite, always the same; more when asked.

    NORMISTRAL_FUZZ=20000 python -m pytest tests/test_fuzz_*.py

tries that many new cases for each property (some minutes each), and keeps what it found in .hypothesis.
"""

import contextlib
import os
import time

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from normistral.errors import NormistralError

_ASKED = os.environ.get("NORMISTRAL_FUZZ")
# Shrinking a template can take minutes, and the suite tells only whether something is wrong.
_PHASES = tuple(Phase) if _ASKED else (Phase.explicit, Phase.generate)
SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def examples(few: int, **changes) -> settings:
    """`few` cases in the suite, NORMISTRAL_FUZZ ones when asked."""
    number = int(_ASKED) if _ASKED else few
    return settings(
        max_examples=number,
        derandomize=not _ASKED,
        deadline=None,
        suppress_health_check=SLOW_TO_DRAW,
        phases=_PHASES,
        **changes,
    )


def require_readable(error: NormistralError) -> None:
    """An error as a user may meet it."""
    assert error.message
    assert error.hint


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: it has no half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Cost:
    """Seconds of the processor, and bytes by which resident memory grew at most; 0 where Linux does not tell."""

    def __enter__(self):
        _write_if_possible("/proc/self/clear_refs", "5")  # the peak begins anew (proc_pid_clear_refs(5))
        self._before, self._started = _status_bytes("VmRSS"), time.process_time()
        return self

    def __exit__(self, *error):
        self.seconds = time.process_time() - self._started
        self.bytes = _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    if not os.path.exists("/proc/self/status"):  # noqa: PTH110 - thousands of times
        return 0
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _write_if_possible(path: str, text: str) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:  # noqa: PTH123
        file.write(text)


CONTROL_TEXTS = (
    *("<|im_start|>", "<|im_end|>", "<|im_start|> system\n", "<|im_end|>\n<|im_start|> assistant\n", "</s>", "<s>"),
    *("<unk>", "<pad>", "<think>", "</think>", "<instruction>", "</instruction>", "[INST]", "[/INST]"),
    *("<|im_", "end|>", "<", "|>", "<|im_end|", "|im_end|>", "<|im_end|>" * 3, "<<|im_end|>|im_end|>"),
)
ODD_TEXTS = (
    *(
        "\0",
        "\ud800",
        "\udfff",
        "\U0010ffff",
        "\ufeff",
        "\u202e",
        "\u200b",
        "\u200d",
        "\x1c",
        "\x85",
        "\u2028",
        "\t\r\n",
    ),
    *("e\u0301", "å", "a\u030a", "ﬁ", "ß", "İ", "👩\u200d👩\u200d👧", "مرحبا", "\u0300" * 40, " ", "▁", "Ġ", "<0x0A>"),
    *("{{ messages }}", "{% for x in y %}", "{#", "%s", "{0}", "\\n", "x" * 300),
)


def hostile_texts(max_pieces: int = 6) -> st.SearchStrategy[str]:
    """Texts that look like control tokens, that are hardly text, and anything else."""
    any_text = st.text(st.characters(exclude_categories=()), max_size=8)
    pieces = st.sampled_from(CONTROL_TEXTS) | st.sampled_from(ODD_TEXTS) | any_text
    return st.lists(pieces, max_size=max_pieces).map("".join)
