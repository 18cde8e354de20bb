"""An experiment: one pytree of parts. Its structure is what compiles, its numbers are traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from noisefl import keys, models, running
from noisefl.average import Average, Mean
from noisefl.cohort import Cohort
from noisefl.data import Dataset, Federation, channels_of
from noisefl.errors import refuse
from noisefl.local import Training
from noisefl.owner import Owner, ServerClients
from noisefl.parts import Part, changed, child, choice, part, static, walk
from noisefl.probing import Judge
from noisefl.schemes import NEVER, Bare, Scheme, Warmup
from noisefl.server import SGD, Server
from noisefl.strategy import Strategy

Params = Any


@part
class Experiment(Part):
    """Everything that `init` and `step` are told, besides a key and the data.

    The defaults are the literal reading of the source (ALGORITHM.md, "Readings that stay open").

    Attributes:
      model: from images [B, H, W, Ch] in [0, 1] to logits [B, C]: a Flax module of linen or nnx, or
        a pair `(init(key, images) → params, apply(params, images) → logits)` (`models.functions`).
    """

    model: Any = static(models.LeNet5(), "network")
    pixels: str = choice(
        "unit", ("unit", "normalised"), "a model sees values in [0, 1], or each channel's in units "
        "of its deviation from its mean over the training images",
    )  # fmt: skip
    channels: Any = static((), "means and deviations of the channels, by `normalised`")
    cohort: Cohort = child(Cohort, "who takes part in a round")
    local: Training = child(Training, "local training of a client")
    scheme: Scheme = child(Warmup, "what clients get instead of W, and how it is read back")
    average: Average = child(Mean, "of the clients' updates")
    server: Server = child(SGD, "from the averaged update to the new base W")
    owner: Owner = child(ServerClients, "how the owner's model G follows W")
    accuracy_on: str = choice(
        "validation", ("validation", "test"), "split on which the cap and the owner are judged"
    )
    running_statistics: str = choice(
        "averaged", ("averaged", "estimated"),
        "of batch normalisation: the mean of the clients', or W's anew on the server's images",
    )  # fmt: skip
    strategy: Strategy = child(Strategy, "speed: how clients, images and layers are laid out")

    def check(self) -> None:
        if self.channels != ():
            models.check_channels(self.channels)

    def resolved(self) -> "Experiment":
        """With everything that is left to the target chosen (`Strategy.resolved`)."""
        return self.replace(strategy=self.strategy.resolved(sum(self.cohort.sizes)))

    @property
    def functions(self) -> models.Functions:
        """Of the model, lowered as the strategy says."""
        if self.pixels == "unit":
            return models.functions(self.model, self.strategy.lowering)
        if not self.channels:
            raise refuse(
                "pixels", self.pixels, "needs the channels: experiment.normalised(dataset)"
            )
        return models.functions(self.model, self.strategy.lowering, self.channels)

    def normalised(self, dataset: Dataset) -> "Experiment":
        """With the means and deviations of a data set's training images, [Ch] each."""
        return self.replace(pixels="normalised", channels=channels_of(dataset))

    def running(
        self, key: jax.Array, base: Params, before: Params, update: Params, judge: Judge
    ) -> Params:
        """W with its running statistics as the experiment wants them; without any as it is.

        Args:
          key: of the round.
          base: W after the server's step, which treats every number as a parameter.
          before: W before it.
          update: the averaged update.
          judge: of the server's split.
        """
        model = self.functions
        state = model.state_of(base)
        if self.running_statistics == "estimated":
            rows = jnp.arange(judge.labels.shape[0])
            own = keys.stream(key, "statistics")
            return running.estimated(own, model, base, judge.images, rows, rows.shape[0])
        old: dict[Any, jax.Array] = flatten_dict(before)  # pyright: ignore
        change: dict[Any, jax.Array] = flatten_dict(update)  # pyright: ignore
        return models.with_leaves(base, {path: old[path] + change[path] for path in state})

    def judge(self, data: Federation) -> Judge:
        """What the parts of a round may ask about models on the judging split."""
        batch = self.strategy.eval_batch
        assert batch is not None, "resolve the experiment first"
        if self.accuracy_on == "test":
            images, labels = data.test_images, data.test_labels
        else:
            images, labels = data.validation_images, data.validation_labels
        axis = self.strategy.clients_axis
        return Judge(self.functions, data.image_shape, images, labels, batch, axis)


def fedavg(experiment: Experiment) -> Experiment:
    """The same run without protection: the warm-up never ends, so that G = W in every round.

    It is the same program, since τ is traced. A scheme without a warm-up gets one around it.
    """
    taus = [place.value for place in walk(experiment) if place.name == "warmup_rounds"]
    if not taus:
        inside = experiment.scheme if experiment.scheme.wrappable else Bare()
        return experiment.replace(scheme=Warmup(inside, NEVER))
    never = np.full(np.shape(taus[0]), NEVER, np.int32)
    return changed(experiment, Warmup, warmup_rounds=never)


def is_fedavg(experiment: Experiment) -> jax.Array | np.ndarray:
    """bool [...]: `fedavg` made it."""
    taus = [place.value for place in walk(experiment) if place.name == "warmup_rounds"]
    return np.asarray(taus[0] == NEVER if taus else False)
