"""A tensor-parallel linear layer in a few lines, right and wrong in many ways, as targets.

The concept `fake_row` is a row-parallel linear layer with a bias: x [sequence, batch, in] is
Shard(-1), weight [out, in] Shard(1), bias and y are Replicate. `fake_sum` reduces summands.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn import Parameter

from verify import oracle
from verify.errors import HarnessError
from verify.layout import Layout
from verify.oracle.contract import Contract, TensorSpec
from verify.placement import Partial, Shard


def _row_contract(case):
    s, b = case.shape["sequence"], case.shape["batch"]
    inside, out = case.shape["in_features"], case.shape["out_features"]

    def reference(inputs, parameters):
        y = inputs["x"] @ parameters["weight"].t() + parameters["bias"]
        return {"y": y}

    sharded = {"tp": Shard(-1)}
    return Contract(
        inputs={"x": TensorSpec((s, b, inside), sharded, sharded)},
        parameters={"weight": (out, inside), "bias": (out,)},
        outputs={"y": TensorSpec((s, b, out))},
        reference=reference,
        linear=True,
        frozen=frozenset({"weight"} if case.options.get("frozen_weight") else ()),
    )


def _sum_contract(case):
    shape = (case.shape["sequence"], case.shape["batch"], case.shape["hidden"])
    return Contract(
        inputs={"x": TensorSpec(shape, {"tp": Partial()}, {})},
        parameters={},
        outputs={"y": TensorSpec(shape)},
        reference=lambda inputs, parameters: {"y": inputs["x"] * 1.0},
        linear=True,
    )


def _zero_contract(case):
    """A contract that shows nothing, which the harness must notice."""
    given = _sum_contract(case)
    return replace(given, reference=lambda inputs, parameters: {"y": inputs["x"] * 0.0})


oracle.CONTRACTS["fake_row"] = _row_contract
oracle.CONTRACTS["fake_sum"] = _sum_contract
oracle.CONTRACTS["fake_zero"] = _zero_contract


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Row:
    """The subject; `defect` names what is wrong with it."""

    def __init__(self, case, group, defect):
        tp, dtype = case.layout.tp, getattr(torch, case.dtype)
        out, inside = case.shape["out_features"], case.shape["in_features"]
        self.case, self.group, self.defect, self.tp = case, group, defect, tp
        self.weight = Parameter(torch.empty(out, inside // tp, dtype=dtype))
        self.weight.requires_grad_(not case.options.get("frozen_weight"))
        self.bias = Parameter(torch.empty(out, dtype=dtype))

    def parameters(self):
        found = {"weight": (self.weight, {"tp": Shard(1)}), "bias": (self.bias, {})}
        if self.defect == "unknown parameter":
            found["scale"] = (Parameter(torch.ones(1)), {})
        if self.defect == "lost parameter":
            del found["bias"]
        return found

    def forward(self, inputs):
        x, bias, rank = inputs["x"], self.bias, dist.get_rank(self.group)
        if self.defect == "raise" or (self.defect == "raise on one" and rank == 1):
            raise ValueError("in_features: 7 is not what I like")
        if self.defect == "detached":
            x = x.detach()
        if self.defect == "bfloat16":
            partial = (x.bfloat16() @ self.weight.bfloat16().t()).to(x.dtype)
        else:
            partial = x @ self.weight.t()
        if self.defect == "bias before sum":
            return {"y": _Reduce.apply(partial + bias, self.group)}
        if self.defect == "no sum":
            return {"y": partial + bias}
        if self.defect == "deadlock" and rank == 1:
            dist.recv(partial, dist.get_global_rank(self.group, 0))
        y = _Reduce.apply(partial, self.group)
        if self.defect == "twice":
            y = _Reduce.apply(y, self.group)
        if self.defect == "copies":
            y = y * (1 + rank * torch.finfo(y.dtype).eps)
        if self.defect == "wrong row" and rank == 1:
            y = torch.cat([y[:-1], y[-1:] + 1e-3])
        if self.defect == "nan":
            y = y * torch.nan
        if self.defect == "extra output":
            return {"y": y + bias, "z": y}
        if self.defect == "transposed":
            y = y.transpose(0, 1).reshape(y.shape)
        if self.defect == "random":
            y = y + torch.rand(1, dtype=y.dtype) * _random.random()
        return {"y": (y + bias).float() if self.defect == "dtype" else y + bias}

    def finish_gradients(self):
        if self.defect == "bias gradient":
            dist.all_reduce(self.bias.grad, group=self.group)
        if self.defect == "frozen gradient":
            self.weight.grad = torch.zeros_like(self.weight)


class Sum:
    """A reduction of summands over tp."""

    def __init__(self, group, defect):
        self.group, self.defect = group, defect

    def parameters(self):
        return {}

    def forward(self, inputs):
        x = inputs["x"]
        if self.defect == "no sum":
            return {"y": x * 1.0}
        if self.defect == "one share":
            shared = x.detach().clone()
            dist.broadcast(shared, dist.get_global_rank(self.group, 1), group=self.group)
            return {"y": x + (shared - x.detach())}
        return {"y": _Reduce.apply(x, self.group)}

    def finish_gradients(self):
        pass


class _Random:
    """A counter that no rank and no run shares its value with."""

    value = 0

    def random(self):
        _Random.value += 1
        return _Random.value


_random = _Random()


class Session:
    def __init__(self, layout: Layout, defect):
        self.layout, self.defect = layout, defect
        rank = dist.get_rank()
        for members in layout.groups("tp"):
            group = dist.new_group(list(members))
            if rank in members:
                self.group = group

    def close(self):
        dist.destroy_process_group(self.group)

    def groups(self):
        return {"tp": self.layout.group_of("tp", dist.get_rank())}

    def probe(self, kind):
        return [int(r) for r in dist.get_process_group_ranks(self.group)]

    def build(self, case):
        if case.concept in ("fake_sum", "fake_zero"):
            return Sum(self.group, self.defect)
        if self.defect == "harness":
            raise HarnessError("the cluster broke under the target")
        width = case.shape["in_features"]
        if width % case.layout.tp and self.defect == "internal":
            return [][width]
        if width % case.layout.tp and self.defect == "vague":
            raise ValueError("it does not fit")
        if width % case.layout.tp and self.defect != "lenient":
            raise ValueError(f"in_features: {width} does not divide by tp={case.layout.tp}")
        return Row(case, self.group, self.defect)


class Right:
    """The right target; a subclass has one defect."""

    name = "fake"
    defect = None

    def version(self):
        return "0"

    def stand_ins(self):
        return ()

    def supports(self, case):
        return "it is too wide" if case.shape.get("in_features") == 1001 else None

    def rank_state(self):
        return ()

    @contextmanager
    def session(self, layout):
        session = Session(layout, self.defect)
        yield session
        session.close()


DEFECTS = (
    "raise", "raise on one", "detached", "bfloat16", "bias before sum", "no sum", "deadlock",
    "twice", "copies", "wrong row", "nan", "extra output", "transposed", "random", "dtype",
    "bias gradient", "frozen gradient", "unknown parameter", "lost parameter", "one share",
    "internal", "vague", "lenient", "harness",
)  # fmt: skip


def target_of(defect):
    """The name of the target with a defect, for `load_target`."""
    return f"fake_targets:{_class_name(defect)}"


def _class_name(defect):
    return "Right" if defect is None else defect.title().replace(" ", "")


for _defect in DEFECTS:
    _name = _class_name(_defect)
    globals()[_name] = type(_name, (Right,), {"defect": _defect})
