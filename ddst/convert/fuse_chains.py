"""Which chains of a traced model can be put off: proofs, and what each module has to do for it.

A chain begins at a value, which some module yields or gets, goes through norm, activation and upsampling and ends in
block-sparse convolutions only. A convolution's output may go to a 2x2 average pool and a sum, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import type_before_parametrizations

from ..nn import SparseConv2d
from ..nn.deferred.plan import Plan, hooked, is_norm
from .fuse_steps import (
    State,
    conv_at,
    described,
    hands_through,
    input_of,
    is_pool,
    memory_of,
    other_summand,
    overwritten,
    reads,
    reads_chain,
    step_of,
    takes_objects,
    users,
)  # fmt: skip
from .fuse_trace import Call, Trace

#: (of a module's argument, output, or of the layer itself; the module; which argument).
Mark = tuple[str, nn.Module, int | str | None]


@dataclass(eq=False)
class Path:
    """From the first step to a convolution, or to the sum that takes it as a residual."""

    end: Node
    names: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(eq=False)
class Epilogue:
    """What a call of a convolution takes up behind itself."""

    conv: Node
    pool: Node | None = None
    sum: Node | None = None

    @property
    def end(self) -> Node:
        return self.sum or self.pool or self.conv


@dataclass(eq=False)
class Vote:
    """That one call wants a mark."""

    seen_by: set[nn.Module]
    takes_norm: bool = False
    shared: bool = True
    plan: Plan = field(default_factory=Plan)


class NotAlone(Exception):
    """A value of a chain also goes elsewhere."""


@dataclass(eq=False)
class Proof:
    """What one trace shows.

    Attributes:
        readers: nodes of dense convolutions that chains may end in, too.
        epilogues: by the node of the convolution.
        fronts: ``conv node -> (names of the steps in front, marks that they need)``.
        doubled: ``sum node -> mark`` of residuals whose upsampling is taken up.
        votes: what calls want; each mark as often as its module is called, or it is not made.
        reasons: ``conv node -> why nothing in front of it is fused``.
    """

    trace: Trace
    epilogues: dict[Node, Epilogue] = field(default_factory=dict)
    fronts: dict[Node, tuple[tuple[str, ...], Mark]] = field(default_factory=dict)
    doubled: dict[Node, Mark] = field(default_factory=dict)
    votes: list[tuple[Mark, Vote]] = field(default_factory=list)
    reasons: dict[Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = list(self.trace.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.convs = [node for node in self.nodes if conv_at(self.trace, node) is not None]
        self.readers = [node for node in self.nodes if reads_chain(self.trace, node)]
        self._find_epilogues()
        self.ended = {epilogue.end: conv for conv, epilogue in self.epilogues.items()}
        self.plans = {conv: Vote({self.trace.leaves[conv].module}) for conv in self.convs}
        for conv, epilogue in self.epilogues.items():
            plan = self.plans[conv].plan
            plan.pool, plan.sum = epilogue.pool is not None, epilogue.sum is not None
            if plan.waits:
                between = {conv, epilogue.pool} if epilogue.sum is not None else {conv}
                self.plans[conv].seen_by |= self._seeing(between)
        self.taken: set[Node] = set()  # inside of a chain that begins before
        for value in self.nodes:
            if value not in self.taken and not hands_through(self.trace, value):
                self._examine(value)
        for conv, vote in self.plans.items():
            if vote.plan.waits or vote.plan.hands_on:
                self.votes.append((("plan", self.trace.leaves[conv].module, None), vote))
        for conv in (*self.convs, *self.readers):
            if conv not in self.fronts and conv not in self.reasons:
                self.reasons[conv] = self._reason(conv)

    # --- behind a convolution -----------------------------------------------------------------------------------------

    def _find_epilogues(self) -> None:
        claimed: dict[Node, Epilogue] = {}
        for conv in self.convs:
            found = self.epilogues[conv] = Epilogue(conv)
            user = _only(conv)
            if user is not None and is_pool(self.trace, user, conv):
                found.pool, user = user, _only(user)
            if user is None or other_summand(user, found.end) is None:
                continue
            if user in claimed:  # both are convolutions: the larger one
                if self._area(conv) <= self._area(claimed[user].conv):
                    continue
                claimed[user].sum = None
            found.sum, claimed[user] = user, found
        for found in self.epilogues.values():
            if found.end is not found.conv and self._changed(input_of(found.conv), found.conv, found.end, {found.end}):
                found.pool = found.sum = None

    def _area(self, conv: Node) -> int:
        layer = self.trace.leaves[conv].module
        assert isinstance(layer, SparseConv2d)
        return layer.kernel_size[0] * layer.kernel_size[1]

    # --- in front of one ----------------------------------------------------------------------------------------------

    def _paths(self, value: Node, state: State, names: tuple[str, ...], nodes: tuple[Node, ...]) -> Iterator[Path]:
        """All ways from a value that is put off; raises NotAlone where one leads elsewhere."""
        found = False
        for user in users(self.trace, value):
            found = True
            epilogue = self.ended.get(user)
            residual = state == State(up=True) and epilogue is not None and self.epilogues[epilogue].sum is user
            ends = user in self.plans or user in self.readers
            if (ends and reads(self.trace, user, value)) or (residual and value not in self.ended):
                yield Path(user, names, nodes)
                continue
            step = step_of(self.trace, user, value, state)
            if step is None:
                raise NotAlone(f"what {described(self.trace, value)} makes also goes to {described(self.trace, user)}")
            yield from self._paths(user, step.state, (*names, step.name), (*nodes, user))
        if not found:
            raise NotAlone(f"what {described(self.trace, value)} makes is not used")

    def _examine(self, value: Node) -> None:
        """Finds the chains that begin at a value, and who is to put them off."""
        heads: dict[Node, list[Path]] = {}
        for user in users(self.trace, value):
            step = step_of(self.trace, user, value, State())
            if step is None:
                continue
            try:
                paths = list(self._paths(user, step.state, (step.name,), (user,)))
            except NotAlone:
                continue
            last = max((self._end_of(path.end) for path in paths), key=lambda node: self.order[node])
            own = {node for path in paths for node in path.nodes} | {self._end_of(path.end) for path in paths}
            changed = self._changed(value, user, last, own)
            if changed is not None:
                self._refuse(paths, f"{described(self.trace, changed)} changes its input in place")
            else:
                heads[user] = paths
        if not heads:
            return
        seen = {head: self._seeing({n for path in paths for n in path.nodes}) for head, paths in heads.items()}
        fresh = self._is_fresh(value) and len(value.users) == 1
        functions: list[Node] = []
        norms: list[nn.Module] = []
        for head, paths in heads.items():
            module = self.trace.module(head)
            if module is None or (overwritten(head, module) is not None and not fresh):
                functions.append(head)  # whoever holds the value has to see it deferred
                continue
            vote = Vote(seen[head] | {module}, is_norm(module), not fresh)
            if isinstance(module, nn.SyncBatchNorm):  # in training it runs by itself
                self.votes.append((("output", module, None), Vote(vote.seen_by, shared=False)))
            if isinstance(module, nn.BatchNorm2d):
                norms.append(module)
            self._grant(paths, ("input", module, 0 if head.args else "input"), vote)
        if functions or (norms and value in self.ended):
            self._put_off(value, heads, functions, norms, set().union(*seen.values()))

    def _put_off(
        self, value: Node, heads: dict[Node, list[Path]], functions: list[Node], norms: Sequence[nn.Module],
        seen: set[nn.Module],
    ) -> None:  # fmt: skip
        """Lets the module that yields a value hand it on as a deferred one, or the module that gets it take it so."""
        trace, paths = self.trace, [path for head in functions for path in heads[head]]
        takes_norm = any(head.target is F.batch_norm for head in functions)
        everywhere = self._stranger(value, heads, list(users(trace, value)))
        producer = trace.leaves.get(value)
        if everywhere is None and value in self.ended:
            vote = self.plans[self.ended[value]]
            vote.plan.hands_on, vote.plan.takes_norm, vote.plan.norms = True, takes_norm, tuple(norms)
            vote.seen_by |= seen | self._seeing({value})
            self._grant(paths, ("plan", trace.leaves[self.ended[value]].module, None), None)
        elif everywhere is None and producer is not None and self._is_fresh(value) and not hooked(producer.module):
            vote = Vote(seen | self._seeing({value}), takes_norm, False)
            self._grant(paths, ("output", producer.module, None), vote)
        elif functions:
            self._enter(value, heads, functions, takes_norm, everywhere)

    def _enter(
        self, value: Node, heads: dict[Node, list[Path]], functions: list[Node], takes_norm: bool, stranger: Node | None
    ) -> None:
        trace, entered = self.trace, dict[Call, list[Node]]()
        for head in functions:
            around = [c for c in trace.scopes[head] if value in c.arguments.values()]
            if overwritten(head, trace.module(head)) is not None:
                self._refuse(heads[head], f"{described(trace, head)} overwrites what others may hold")
                continue
            if around:
                entered.setdefault(around[-1], []).append(head)
                continue
            whence = f"also goes to {described(trace, stranger)}" if stranger else "comes from no module"
            if value in trace.leaves and hooked(trace.leaves[value].module):
                whence = "comes from a module with hooks"
            self._refuse(heads[head], f"what enters {described(trace, head)} {whence}")
        for call, inner in entered.items():
            paths = [path for head in inner for path in heads[head]]
            inside = [user for user in users(trace, value) if call in trace.scopes[user]]
            other = self._stranger(value, heads, inside)
            if other is not None:
                reason = f"what enters {described(trace, inner[0])} also goes to {described(trace, other)}"
                self._refuse(paths, reason)
                continue
            place = next(place for place, node in call.arguments.items() if node is value)
            seen = self._seeing({n for path in paths for n in path.nodes}) | self._seeing({value}, call)
            self._grant(paths, ("input", call.module, place), Vote(seen | {call.module}, takes_norm))

    def _stranger(self, value: Node, heads: dict[Node, list[Path]], among: Iterable[Node]) -> Node | None:
        """A use of a value that would not know it deferred, or defer it without need."""
        for user in among:
            if user in heads:
                continue
            step = step_of(self.trace, user, value, State())
            norm = step is not None and step.kind == "norm"
            if (step is not None and not norm) or not takes_objects(self.trace, user):
                return user
        return None

    def _is_fresh(self, value: Node) -> bool:
        """Whether nobody but the code that is traced holds what a module returns."""
        module = self.trace.module(value)
        if module is None:
            return value in self.ended
        kind = type_before_parametrizations(module)
        return kind in (nn.Conv2d, nn.ConvTranspose2d, SparseConv2d, nn.BatchNorm2d, nn.SyncBatchNorm)

    # --- what is noted ------------------------------------------------------------------------------------------------

    def _grant(self, paths: list[Path], mark: Mark, vote: Vote | None) -> None:
        if vote is not None:
            self.votes.append((mark, vote))
        for path in paths:
            self.taken.update(path.nodes)
            if path.end in self.plans or path.end in self.readers:
                self.fronts[path.end] = (path.names, mark)
            else:
                self.doubled[path.end] = mark

    def _refuse(self, paths: list[Path], reason: str) -> None:
        for path in paths:
            self.reasons.setdefault(path.end, reason)

    def _end_of(self, node: Node) -> Node:
        """Where a convolution runs that may wait."""
        return self.epilogues[node].end if node in self.epilogues else node

    def _changed(self, value: object, first: Node, last: Node, own: set[Node]) -> Node | None:
        """What changes a value in place between two nodes."""
        if not isinstance(value, Node):
            return None
        memory = memory_of(self.trace, value)
        for node in self.nodes[self.order[first] + 1 : self.order[last] + 1]:
            target = overwritten(node, self.trace.module(node))
            if target is not None and node not in own and memory_of(self.trace, target) is memory:
                return node
        return None

    def _seeing(self, nodes: Iterable[Node | None], within: Call | None = None) -> set[nn.Module]:
        """The modules that get or return one of these values."""
        wanted, found = {node for node in nodes if node is not None}, set()
        for call in self.trace.calls:
            inside = within is None or (bool(call.outputs) and within in self.trace.scopes[call.outputs[0]])
            if inside and not wanted.isdisjoint(chain(call.arguments.values(), call.outputs)):
                found.add(call.module)
        return found

    def _reason(self, conv: Node) -> str:
        value = input_of(conv)
        assert isinstance(value, Node)
        nodes, before = [value], value
        while True:
            source = next((n for n in before.all_input_nodes if _could_step(self.trace, before, n)), None)
            if source is None:
                break
            nodes.append(source)
            before = source
        if len(nodes) == 1:
            return f"reads what {described(self.trace, value)} makes, no norm, activation or upsampling"
        for node in nodes[:-1]:
            strangers = [
                u for u in users(self.trace, node) if u not in nodes and u not in self.plans and u not in self.readers
            ]
            if strangers:
                return f"what {described(self.trace, node)} makes also goes to {described(self.trace, strangers[0])}"
        return f"{described(self.trace, nodes[-2])} and what follows are not all of a fused chain"


def _could_step(trace: Trace, node: Node, value: Node) -> bool:
    return any(step_of(trace, node, value, state) is not None for state in (State(), State(norm=True)))


def _only(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
