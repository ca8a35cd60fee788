"""Targets that compute nothing of their own: impl's, with outputs, gradients or parameters undone,
or replaced by what the reference computes."""

from contextlib import contextmanager

import torch

from verify import oracle
from verify.targets.impl import Target as Right


class Spoilt:
    """A subject of impl's; a subclass undoes a part of it."""

    def __init__(self, inner, case):
        self.inner, self.case = inner, case

    def parameters(self):
        return self.inner.parameters()

    def forward(self, inputs):
        return self.inner.forward(inputs)

    def finish_gradients(self):
        self.inner.finish_gradients()


class EmptySubject(Spoilt):
    def forward(self, inputs):
        return {name: y[:0] for name, y in super().forward(inputs).items()}


class FrozenSubject(Spoilt):
    """All parameters are frozen, and inputs with them."""

    def parameters(self):
        found = self.inner.parameters()
        for parameter, _ in found.values():
            parameter.requires_grad_(False)
        return found

    def finish_gradients(self):
        pass


class DetachedSubject(Spoilt):
    def forward(self, inputs):
        return {name: y.detach() for name, y in super().forward(inputs).items()}

    def finish_gradients(self):
        pass


class ConstantSubject(Spoilt):
    """Outputs are right and depend on nothing: every gradient is there, and zero."""

    def forward(self, inputs):
        found = super().forward(inputs)
        return {name: y.detach() + 0.0 * y for name, y in found.items()}


class ZeroSubject(Spoilt):
    def forward(self, inputs):
        return {name: 0.0 * y for name, y in super().forward(inputs).items()}


class OracleSubject(Spoilt):
    """Asks the oracle for its computation, which on one rank is right."""

    def forward(self, inputs):
        contract = oracle.CONTRACTS[self.case.concept](self.case)
        weights = {name: parameter for name, (parameter, _) in self.parameters().items()}
        return contract.reference(inputs, weights)


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, stolen):
        return stolen

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _in_place(y, stolen):
    return _Replaced.apply(y, stolen) if y.shape == stolen.shape else y


class _Target(Right):
    subject = Spoilt

    @contextmanager
    def session(self, layout):
        with super().session(layout) as session:
            yield _Session(session, self.subject)


class _Session:
    def __init__(self, inner, subject):
        self.inner, self.subject = inner, subject

    def build(self, case):
        return self.subject(self.inner.build(case), case)


WAYS = {
    each.__name__.removesuffix("Subject"): each
    for each in (
        EmptySubject, FrozenSubject, DetachedSubject, ConstantSubject, ZeroSubject, OracleSubject,
    )
}  # fmt: skip
for _name, _subject in WAYS.items():
    globals()[_name] = type(_name, (_Target,), {"subject": _subject})


class AskingSubject(Spoilt):
    """Leaves it to the oracle what to refuse."""

    def __init__(self, inner, case):
        super().__init__(inner, case)
        oracle.CONTRACTS[case.concept](case)


class RefusingSubject(Spoilt):
    """Refuses whatever it is given."""

    def forward(self, inputs):
        raise ValueError(f"sequence: {self.case.shape['sequence']} is not what I like")


class Refusing(_Target):
    subject = RefusingSubject


class PaddingSubject(Spoilt):
    """Makes inputs fit: it takes the sizes that the case says, and repeats what lacks."""

    def forward(self, inputs):
        x = inputs["x"]
        width = self.case.shape["in_features"] // self.case.layout.tp
        places = torch.arange(width).clamp(max=x.shape[-1] - 1)
        return super().forward({"x": x.index_select(-1, places)})


class Padding(_Target):
    subject = PaddingSubject


class Asking(_Target):
    subject = AskingSubject


class Unspoilt(_Target):
    """The same detour and nothing undone."""


class RefusingStreams:
    """Refuses whatever is done with them."""

    def add(self, name, *, seed):
        raise ValueError(f"name: {name} is not what I like")


class SpentStreams:
    """impl's, of which a number is drawn before anything is refused."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def add(self, name, *, seed):
        torch.rand(1)
        self.inner.add(name, seed=seed)


class _Streaming(_Session):
    def tracker(self):
        return self.subject(self.inner.tracker())


class Refuses(_Target):
    """Has no stream that is added."""

    @contextmanager
    def session(self, layout):
        with Right.session(self, layout) as session:
            yield _Streaming(session, lambda inner: RefusingStreams())


class Spends(_Target):
    """Moves the default stream when it refuses."""

    @contextmanager
    def session(self, layout):
        with Right.session(self, layout) as session:
            yield _Streaming(session, SpentStreams)
