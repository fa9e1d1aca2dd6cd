"""What a server takes on at most; every limit has its one default here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from normistral.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30
LINGER_S = 2.0  # for the sender of a refused request to read that, before a reset takes it away


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of one server.

    Attributes:
        body_bytes: of a request's body; refused with 413 before more is read.
        header_bytes: of a request's line and headers.
        json_depth: how deep arrays and objects of a body may nest.
        json_members: of one object of a body.
        json_values: of a whole body.
        json_containers: arrays and objects of a whole body; each costs as much as a dozen plain values.
        choices: the most that `n` may be.
        context: tokens of prompt and answer together; None is the model's own context.
        new_tokens: of one answer; None is as many as fit.
        jobs: answers of all callers that wait or are being written; one more is refused with 429.
        tenant_jobs: of these, one caller's.
        connections: open at once. One more takes the place of that which has kept the server waiting longest, or is
            refused with 503.
        header_s: for a request's headers to arrive.
        body_s: for its body.
        queue_s: until an answer begins to be computed; then 503.
        request_s: until it is whole; then 503, or an error event in a stream.
        stall_s: that what was written may wait to be taken, and a second more for 16 KiB; then the connection is cut.
        keep_alive_s: between two requests.
        backlog: steps that may wait for a reader, beyond what the system's buffers hold; then likewise.
        grace_s: for answers under way once the server is told to stop.
    """

    body_bytes: int = MIB
    header_bytes: int = 32 * KIB
    json_depth: int = 64
    json_members: int = 1024
    json_values: int = 100_000
    json_containers: int = 4096
    choices: int = 8
    context: int | None = None
    new_tokens: int | None = None
    jobs: int = 128
    tenant_jobs: int = 64
    connections: int = 256
    header_s: float = 10.0
    body_s: float = 20.0
    queue_s: float = 120.0
    request_s: float = 900.0
    stall_s: float = 30.0
    keep_alive_s: float = 30.0
    backlog: int = 1024
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        """Raises UsageError for a limit below 1."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise UsageError(f"the limit {field.name} must be above 0, not {value}", "leave it out for the default")

    def context_of(self, context_length: int) -> int:
        """Tokens that prompt and answer may take together on a model with this context."""
        return context_length if self.context is None else min(self.context, context_length)
