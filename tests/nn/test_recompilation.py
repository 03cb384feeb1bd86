"""How often a compiled layer is compiled anew while the number of its blocks changes."""

from __future__ import annotations

import pytest
import torch

import ddst

COUNTS = (32, 30, 28, 36, 20, 41)


@pytest.mark.parametrize("reserve", [None, 0.7])
@pytest.mark.parametrize("static", [True, False])
def test_a_compiled_layer_is_compiled_anew_where_the_number_of_slots_changes(
    static: bool, reserve: float | None
) -> None:
    """A limit in docs/layers.md: torch takes a parameter's shape for a constant unless it is told otherwise."""
    layer = ddst.SparseLinear(64, 64, density=0.5, block=8, reserve=reserve)
    seen = []

    def compiler(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    x = torch.randn(4, 64)
    with torch._dynamo.config.patch(force_parameter_static_shapes=static):
        for count in COUNTS:
            layer.set_block_mask((torch.randperm(64) < count).view_as(layer.block_mask))
            torch.testing.assert_close(compiled(x), layer(x))
    assert layer.storage_version == (4 if reserve is None else 0)  # 30 blocks fit 32 slots
    assert len(seen) == (1 if reserve else 2 if not static else 5)
    torch._dynamo.reset()
