"""What every recipe may be told; each has settings of its own beside these, which are keys of the same file.

Belongs here: keys, their defaults and their comments. Not here: what is done with them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from freehold.errors import BadInput
from freehold.parallel.processes import Sizes
from freehold.recipes.toml import Key
from freehold.train.optim import OptimizerSettings
from freehold.train.schedule import Schedule
from freehold.train.step import Objective

# What a saved run does not remember: it changes no weight. Data, model and tokenizer may move: they are known by
# digests. Threads and processes are remembered apart, for they change a weight's last bits alone.
FREE_TO_CHANGE = (
    "out",
    "save_every",
    "num_kept",
    "evaluate_every",
    "tensorboard",
    "data",
    "model",
    "tokenizer",
    "parallel",
    "threads",
)


FALLING = Schedule(peak=1e-5, end=1e-6, warmup=10, decay=190, total=200, shape="cosine")
ADAMW = OptimizerSettings()
OBJECTIVE = Objective()


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on, and in which portions."""

    train: Annotated[tuple[Path, ...], Key(says="Data sets, folders that `freehold data build` made.")]
    weights: Annotated[
        tuple[float, ...], Key(says="The share of tokens of each data set; without any, each has that of its size.")
    ] = ()
    held_out: Annotated[tuple[Path, ...], Key(says="Data sets that are not trained on: their loss is measured.")] = ()
    sequence_tokens: Annotated[
        int, Key(says="Longest sequence. Longer texts become several, longer conversations are cut.", least=1)
    ] = 2048
    budget_tokens: Annotated[
        int,
        Key(says="Tokens that are computed together; memory grows with them, results do not change.", least=1),
    ] = 2048
    tokens_per_step: Annotated[
        int, Key(says="Tokens that a step learns from, at most: a multiple of budget_tokens.", least=1)
    ] = 16384
    shuffled: Annotated[
        bool, Key(says="Whether each pass has an order of its own, by the seed; false keeps that of the files.")
    ] = True


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How several processes share a run; nothing of it means anything to one alone."""

    weights: Annotated[
        Literal["replicate", "shard"],
        Key(
            says='Whether each process has all weights, or (FSDP2) a part of them and of the optimizer: "shard" is for '
            "models that one cannot hold. Adapters and Muon want whole weights."
        ),
    ] = "replicate"
    copies: Annotated[
        int, Key(says="How many copies of a sharded model there are; processes divide evenly into them.", least=1)
    ] = 1
    tensor: Annotated[
        int,
        Key(says="Over how many processes every block is divided, by heads and channels.", least=1),
    ] = 1
    expert: Annotated[
        int,
        Key(says="Over how many processes the experts of each block are divided.", least=1),
    ] = 1
    context: Annotated[
        int,
        Key(says="Over how many processes sequences are divided, for those that are too long for one.", least=1),
    ] = 1

    @property
    def sizes(self) -> Sizes:
        """How many processes there are along each dimension but data, which has the rest."""
        return Sizes(expert=self.expert, context=self.context, tensor=self.tensor)

    @property
    def least_processes(self) -> int:
        """How few processes a run can do with: weights are not sharded before there are two parts of them."""
        return self.expert * self.context * self.tensor * (2 * self.copies if self.weights == "shard" else 1)

    def __post_init__(self) -> None:
        """Refuse what does not fit together. Raises: BadInput."""
        if self.weights == "shard" and max(self.tensor, self.expert) > 1:
            raise BadInput('`parallel.tensor` and `parallel.expert` divide weights that are not sharded: "replicate"')
        if self.weights == "replicate" and self.copies > 1:
            raise BadInput(
                '`parallel.copies` is for `parallel.weights = "shard"`: replicated weights are copies already'
            )


SCHEDULE_KEY = Key(
    says="The learning rate, in steps: it rises over `warmup` to `peak`, stays, and falls over the last `decay` "
    "to `end` in a shape: linear, cosine or minus_sqrt. `total` is the length of the run; where it is given "
    "alone, the others keep their share of it."
)
ALIKE = ParallelSettings()
EXAMPLE_DATA = DataSettings(train=(Path("./data"),))


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What every recipe may be told."""

    out: Annotated[
        Path,
        Key(says="The run's folder. The same command takes up a run that was stopped there.", example=Path("./my-run")),
    ]
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Key(says="What weights are computed in. With bfloat16, float32 masters of them are trained."),
    ] = "float32"
    recompute: Annotated[
        bool,
        Key(says="Whether backward computes each block anew, and keeps less memory until then."),
    ] = False
    seed: Annotated[int, Key(says="What decides the order of data, and a new model's weights.")] = 0
    threads: Annotated[
        int | None,
        Key(
            says="CPU threads; unset, one for each core. A run goes on with as many as it began with.",
            least=1,
            most=4096,
        ),
    ] = None
    device: Annotated[str, Key(says="cpu, cuda or cuda:N.")] = "cpu"
    save_every: Annotated[int, Key(says="Steps from one save to the next; the end and Ctrl-C save, too.", least=1)] = (
        100
    )
    num_kept: Annotated[int, Key(says="How many saves stay on the disk.", least=1)] = 2
    evaluate_every: Annotated[
        int, Key(says="Steps from one measurement on held-out data to the next; the end has one, too.", least=1)
    ] = 100
    tensorboard: Annotated[bool, Key(says="Whether TensorBoard can follow the run, too.")] = False
    parallel: Annotated[
        ParallelSettings,
        Key(says="How the processes that `torchrun --nproc-per-node N -m freehold` starts share a run."),
    ] = ALIKE
    data: Annotated[DataSettings, Key(says="What is trained on.", example=EXAMPLE_DATA)]
    schedule: Annotated[
        Schedule,
        SCHEDULE_KEY,
    ] = FALLING
    optimizer: Annotated[
        OptimizerSettings, Key(says='AdamW; `matrices = "muon"` moves the matrices of blocks by Muon.')
    ] = ADAMW
    objective: Annotated[
        Objective,
        Key(says="What is added to the loss in models with MTP or experts, and where gradients are clipped."),
    ] = OBJECTIVE

    def __post_init__(self) -> None:
        """Refuse what does not fit together. Raises: BadInput."""
        data, betas = self.data, self.optimizer.betas
        if data.tokens_per_step % data.budget_tokens:
            raise BadInput(
                f"`data.tokens_per_step` is {data.tokens_per_step:,}, which is no multiple of `data.budget_tokens`, "
                f"{data.budget_tokens:,}"
            )
        if data.sequence_tokens > data.budget_tokens:
            raise BadInput(
                f"`data.sequence_tokens` is {data.sequence_tokens:,}, more than `data.budget_tokens`, "
                f"{data.budget_tokens:,}"
            )
        if not data.train:
            raise BadInput("`data.train` names no data set")
        if data.weights and len(data.weights) != len(data.train):
            raise BadInput(f"`data.weights` has {len(data.weights)} entries for {len(data.train)} data sets")
        if max(betas) >= 1:
            raise BadInput(f"`optimizer.betas` is {list(betas)}, wanted less than 1")
        if self.optimizer.momentum >= 1:
            raise BadInput(f"`optimizer.momentum` is {self.optimizer.momentum}, wanted less than 1")
        if not self.objective.max_gradient_norm:
            raise BadInput(
                "`objective.max_gradient_norm` is 0, which leaves nothing of a gradient", hint="1e9 clips nothing"
            )
        if self.optimizer.matrices == "muon" and (self.parallel.weights == "shard" or self.parallel.tensor > 1):
            raise BadInput(
                '`optimizer.matrices = "muon"` moves whole matrices, and with `parallel` as it is a process has parts',
                hint='"adamw" moves parts, too',
            )
        if self.schedule.total < 1:
            raise BadInput("`schedule.total` is 0, wanted 1 step or more")
        if self.schedule.decay and self.schedule.end > self.schedule.peak:
            raise BadInput(
                f"`schedule.end` is {self.schedule.end}, more than `schedule.peak`, {self.schedule.peak}: the rate "
                "would rise at the end",
                hint="a lower peak than usual takes a lower end, too",
            )

    @property
    def packs_per_step(self) -> int:
        return self.data.tokens_per_step // self.data.budget_tokens

    def remembered(self) -> dict[str, Any]:
        """Return what a saved run remembers of the settings, and goes on with only."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_TO_CHANGE}
