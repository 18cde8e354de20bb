"""What thieves make, in the end, of all that they have seen."""

from typing import Any

import jax
import jax.numpy as jnp

from noisefl import keys, theft
from noisefl.attacks import Attack
from noisefl.cohort import Members
from noisefl.data import Federation
from noisefl.errors import nearest, refuse
from noisefl.experiment import Experiment
from noisefl.measure.base import Conclusion, Following, Numbers, Params
from noisefl.models import Functions
from noisefl.parts import children, choice, implementations, name_of, part, size, text
from noisefl.round import RoundInfo, State

FEW = ("bare_copy", "scratch", "fine_tune", "ridge", "average")  # that are cheap and tell much

MOST = 1000  # thieves followed: the views of all of them are kept, also where a round has fewer


@part
class Thieves(Following):
    """What thieves make of the views that they had when the run ends, beside what they could have
    made of their own data alone (PROTECTION.md, "Threat model" and "Thieves").

    Single thieves and coalitions are clients of the last round, taken from both groups in turn; a
    coalition of c is the first c of them. Memory is that of A · J copies and as many returned
    models.

    Attributes:
      attacks: "few" are `FEW`, and "all" those of `noisefl.attacks` and of yours that are imported,
        in both cases as far as they can attack the model at hand.
      until: T. Then the members of round T are followed from the beginning, and views hold the
        newest J of their rounds. None: views are of the newest round alone, whichever it is.
    """

    attacks: str = text("few", "what thieves try: few, all, or names joined by +")
    more_attacks: tuple[Attack, ...] = children((), "attacks beside them, with numbers of your own")
    singles: int = size(1, "single thieves", unit="clients", high=MOST)
    coalitions: str = text(
        "2", "members of each coalition, joined by +; those larger than a round are left out"
    )
    kept_copies: int = size(1, "J, newest rounds of a client that a view holds", unit="rounds")
    until: int | None = size(None, "T, last round", unit="rounds", none="views of one round")
    controls: str = choice(
        "fedavg", theft.CONTROLS, "runs in which scratch and the server alone are tried as well"
    )
    thief_images: int = size(0, "test images for thieves; 0: all", unit="images", low=0)

    def check(self) -> None:
        _ = self.sizes
        titles = [attack.title for attack in self.tried]
        if len(set(titles)) < len(titles):
            raise refuse("attacks", titles, "must have different titles")

    @property
    def tried(self) -> tuple[Attack, ...]:
        """The attacks."""
        known: dict[str, Any] = {name_of(cls): cls for cls in implementations(Attack)}
        names = {"few": FEW, "all": tuple(known)}.get(self.attacks, self.attacks.split("+"))
        for name in names:
            if name not in known:
                raise refuse("attacks", self.attacks, nearest(name, ["few", "all", *known]))
        return (*(known[name]() for name in names), *self.more_attacks)

    def able(self, model: Functions, image_shape: tuple[int, int, int]) -> tuple[Attack, ...]:
        """Those that can attack a model.

        Raises:
          ValueError: one that is asked for by name cannot.
        """
        found = []
        for attack in self.tried:
            try:
                attack.fit(model, image_shape)
            except ValueError:
                if self.attacks not in ("few", "all") or attack in self.more_attacks:
                    raise
                continue
            found.append(attack)
        return tuple(found)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Members of each coalition."""
        words = [word.strip() for word in self.coalitions.split("+") if word.strip()]
        if not all(word.isdecimal() and 2 <= int(word) <= MOST for word in words):
            allowed = (
                f"must be whole numbers of at least 2 and at most {MOST}, joined by +, or empty"
            )
            raise refuse("coalitions", self.coalitions, allowed)
        return tuple(sorted(set(map(int, words))))

    @property
    def followers(self) -> int:
        return max(self.singles, *self.sizes, 1)

    @property
    def kept(self) -> int:
        """J."""
        return 1 if self.until is None else self.kept_copies

    def init(self, key: jax.Array, experiment: Experiment, data: Federation, state: State) -> Any:
        """`theft.Seen`, of nothing yet."""
        if self.kept_copies > 1 and self.until is None:
            raise refuse("kept_copies", self.kept_copies, "needs `until`, the last round")
        model, shape = experiment.functions, data.image_shape
        self.able(model, shape)
        clients = jnp.full(self.followers, -1, jnp.int32)
        if self.until is not None:
            last = experiment.cohort.draw(keys.of_round(key, self.until), data.counts)
            turn = theft.in_turn(last.groups, self.followers)
            clients = clients.at[: turn.shape[0]].set(last.clients[turn])
        touched = experiment.scheme.touched(model, shape)
        return theft.Seen.empty(clients, state.base, touched, self.kept, experiment.scheme.partial)

    def places(self, members: Members, carry: Any) -> jax.Array:
        if self.until is None:
            turn = theft.in_turn(members.groups, self.followers)
            nowhere = jnp.full(members.clients.shape, self.followers)
            return nowhere.at[turn].set(jnp.arange(turn.shape[0]))
        same = members.clients[:, None] == carry.clients
        return jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), self.followers)

    def update(
        self, experiment: Experiment, before: State, after: State, info: RoundInfo,
        observed: Any, data: Federation, carry: Any,
    ) -> tuple[Numbers, Any]:  # fmt: skip
        """No numbers but the round's own: who was there is remembered."""
        scheme, model, issue = experiment.scheme, experiment.functions, info.issue
        places = self.places(info.members, carry)
        there = jnp.zeros(self.followers, bool).at[places].set(True, mode="drop") & issue.shipped
        clients = carry.clients
        if self.until is None:
            newest = clients.at[places].set(info.members.clients, mode="drop")
            clients = jnp.where(issue.shipped, newest, clients)
        copies, returned = info.followed

        def spread(copy: Params) -> dict[Any, jax.Array]:
            known = scheme.spread(copy, issue.strength, model, data.image_shape)
            return {path: jnp.where(issue.protected, one, 0.0) for path, one in known.items()}

        known = jax.vmap(spread)(copies)
        seen = carry.replace(clients=clients)
        return {"round": after.round}, seen.plus(
            there, after.round, copies, returned, known, issue.protected
        )

    @property
    def concludes(self) -> bool:
        return True

    def conclude(
        self, key: jax.Array, experiment: Experiment, data: Federation, owner: Params, carry: Any
    ) -> Conclusion:
        most = sum(experiment.cohort.sizes)
        return theft.stolen(
            keys.stream(key, "thieves"), experiment, data, owner, carry,
            self.able(experiment.functions, data.image_shape), min(self.singles, most),
            tuple(size for size in self.sizes if size <= most), self.controls, self.thief_images,
        )  # fmt: skip
