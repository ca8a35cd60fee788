"""The contracts of a mixture of experts.

Tokens lie on the dense mesh and experts on the expert mesh, over the same ranks: all of a pipeline
stage. So these concepts name the axes of both, a replica is a stage, and the reference is given
the tokens of all its ranks. Gradients of parameters are sums over every token and complete after
`finish_gradients`, over dp and cp (experts: edp) too, where a trainer sums them in its own way.
"""

from verify.oracle.moe.bias import moe_expert_bias
from verify.oracle.moe.dispatch import moe_dispatch
from verify.oracle.moe.layer import moe_layer
from verify.oracle.moe.router import moe_router

__all__ = ["moe_dispatch", "moe_expert_bias", "moe_layer", "moe_router"]
