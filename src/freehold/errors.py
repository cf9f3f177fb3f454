"""Everything that Freehold raises on purpose.

    FreeholdError
    ├── BadInput              what the user gave cannot be used; the command line exits with 2
    │   ├── BadFile           a file is damaged, cut short, or not what its name says
    │   ├── CheckpointMismatch  tensors and model do not fit each other
    │   ├── UnsupportedModel  a valid file of a model, or of a feature, that Freehold does not implement
    │   ├── BadTemplate       a chat template that fails or leaves its budget
    │   ├── BadRequest        a request that cannot be run: sampling values, messages
    │   │   └── TooLong       its prompt and answer have more tokens than there is room for
    │   └── NotFound          no such file, model or catalogue name
    ├── CheckFailed           a law of the design does not hold for a model; the command line exits with 1
    ├── Diverged              a step of training found no number
    ├── PeerFailed            another process of the same run failed, and has said why
    ├── PeerLost              another process of the same run is gone, and has not
    ├── Overloaded            the engine has as much waiting as it may have
    ├── Draining              the engine takes nothing new, for it is about to stop
    ├── TimedOut              a request was not done by its deadline
    ├── EngineFailed          a request failed inside the engine through no fault of its own
    └── DatabaseFailed        the database of keys does not answer; what was asked of it did not happen

A bug in Freehold is an `AssertionError` and never one of these.
"""


class FreeholdError(Exception):
    """An error with one line that says what was seen, where and what was wanted, and a hint for the next step."""

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {self.message}"
        return f"{head}\nhint: {self.hint}" if self.hint else head


class BadInput(FreeholdError):
    """What the user gave cannot be used."""


class BadFile(BadInput):
    """A file is damaged, cut short, or not what its name says."""


class CheckpointMismatch(BadInput):
    """The tensors of a checkpoint and the parameters of its model do not fit each other."""


class UnsupportedModel(BadInput):
    """A model, or a feature of one, that Freehold does not implement."""


class BadTemplate(BadInput):
    """A chat template that fails or leaves its budget of steps, time or output."""


class BadRequest(BadInput):
    """A request that cannot be run."""


class TooLong(BadRequest):
    """A prompt, with the answer that is wanted, has more tokens than there is room for."""


class NotFound(BadInput):
    """No such file, model or catalogue name."""


class CheckFailed(FreeholdError):
    """A law of the design does not hold for a model."""


class Diverged(FreeholdError):
    """A step of training found a loss, or a gradient, that is no number."""


class PeerFailed(FreeholdError):
    """Another process of the same run failed first, and has said why."""


class PeerLost(FreeholdError):
    """Another process of the same run is gone without a word."""


class Overloaded(FreeholdError):
    """The engine has as much waiting as it may have; later there is room again."""


class Draining(FreeholdError):
    """The engine takes nothing new, for it is about to stop."""


class TimedOut(FreeholdError):
    """A request was not done by its deadline."""


class EngineFailed(FreeholdError):
    """A request failed inside the engine through no fault of its own."""


class DatabaseFailed(FreeholdError):
    """The database of keys does not answer, or not as it should; what was asked of it did not happen."""
