"""Int8 layers compute what float layers with the same weights compute, and are modules like any other."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem.numerics.held_weights import nbytes_of, parameter_count
from lowmem.optim import SGD
from lowmem.quant import int8_linear
from lowmem.quant.int8_embedding import Int8Embedding, Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear


def linear(out, into, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(into, out, bias=bias).to(dtype)


def twin_of(layer: Int8Linear) -> nn.Linear:
    """A float layer with the weights that the int8 layer stands for."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin = twin.to(layer.weight.dtype)
    twin.weight.data = layer.dequantized()
    if layer.bias is not None:
        twin.bias.data = layer.bias.detach().clone()
    return twin


def in_charge(*layers):
    """An optimizer that has the handles, so that gradients are wanted."""
    return SGD([layer.weight for layer in layers], lr=0.1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3, 16, 256]),
    st.booleans(),
    st.sampled_from([(5,), (2, 3)]),
    st.integers(1, 200),
)
def test_products_and_gradients_are_those_of_a_float_layer(out, into, group, bias, batch, tile):
    layer = Int8Linear.from_linear(linear(out, into, bias), group_size=group)
    twin, optimizer = twin_of(layer), in_charge(layer)
    x = torch.randn(*batch, into, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    original, int8_linear.PRODUCT_TILE_NUMEL = int8_linear.PRODUCT_TILE_NUMEL, tile
    try:
        y, expected = layer(ours), twin(theirs)
        y.square().sum().backward()
    finally:
        int8_linear.PRODUCT_TILE_NUMEL = original
    expected.square().sum().backward()
    assert torch.allclose(y, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert torch.allclose(layer.held.grad, twin.weight.grad, atol=1e-4, rtol=1e-4)
    if bias:
        assert torch.allclose(layer.bias.grad, twin.bias.grad, atol=1e-4, rtol=1e-4)
    assert layer.weight.grad.numel() == 0, "no gradient of the weight's size in .grad"
    del optimizer


def test_a_look_up_and_a_tied_head_are_those_of_a_float_embedding():
    torch.manual_seed(0)
    embedding = Int8Embedding.from_embedding(nn.Embedding(23, 10, padding_idx=2), group_size=4)
    head, optimizer = Int8TiedLinear(embedding), in_charge(embedding)
    twin = nn.Embedding(23, 10, padding_idx=2)
    twin.weight.data = embedding.dequantized()
    ids = torch.tensor([[1, 2, 5], [5, 0, 22]])
    (head(embedding(ids)) ** 2).sum().backward()
    (nn.functional.linear(twin(ids), twin.weight) ** 2).sum().backward()
    assert torch.equal(embedding(ids), twin(ids))
    assert torch.allclose(embedding.held.grad, twin.weight.grad, rtol=1e-4, atol=1e-4)
    assert parameter_count(nn.ModuleList([embedding, head])) == 230
    del optimizer


def test_hooks_of_a_weight_that_is_used_twice_run_once_with_the_whole_gradient():
    layer = Int8Linear.from_linear(linear(8, 8))
    optimizer, seen = in_charge(layer), []
    layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append(layer.held.grad.clone()))
    twin = twin_of(layer)
    x = torch.randn(3, 8)
    layer(torch.tanh(layer(x))).sum().backward()
    twin(torch.tanh(twin(x))).sum().backward()
    assert len(seen) == 1
    assert torch.allclose(seen[0], twin.weight.grad, atol=1e-5)
    del optimizer


def test_an_update_inside_backward_does_not_change_the_input_gradient():
    layer = Int8Linear.from_linear(linear(6, 6))
    twin, optimizer = twin_of(layer), in_charge(layer)
    layer.weight.register_post_accumulate_grad_hook(
        lambda param: optimizer.step_param(param, optimizer.param_groups[0])
    )
    x = torch.randn(4, 6)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = layer.dequantized()
    layer(ours).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert not torch.equal(layer.dequantized(), before)


def test_a_weight_that_changed_since_the_forward_pass_is_an_error():
    layer = Int8Linear.from_linear(linear(6, 6))
    optimizer = in_charge(layer)
    loss = layer(torch.randn(4, 6)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward pass"):
        loss.backward()


@pytest.mark.parametrize("make", [lambda params: torch.optim.AdamW(params), lambda params: None])
def test_a_gradient_that_nobody_would_use_is_an_error(make):
    layer = Int8Linear.from_linear(linear(6, 6))
    make(layer.parameters())
    with pytest.raises(RuntimeError, match=r"lowmem\.build_optimizer"):
        layer(torch.randn(4, 6)).sum().backward()
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 6)).sum().backward()
    assert layer.held.grad is None


# ------------------------------------------------------------------ a module like any other


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)],
)
def test_a_change_of_dtype_leaves_codes_and_scales(convert):
    layer = Int8Linear.from_linear(linear(5, 9))
    codes, scales = layer.weight_codes.clone(), layer.weight_scales.clone()
    convert(layer)
    assert torch.equal(layer.weight_codes, codes)
    assert layer.weight_codes.dtype == torch.int8
    assert torch.equal(layer.weight_scales, scales)
    assert layer.weight_scales.dtype == torch.float32
    assert layer.weight.dtype == layer.bias.dtype != torch.float32
    assert layer(torch.randn(2, 9, dtype=layer.weight.dtype)).dtype == layer.weight.dtype


def test_a_copy_has_weights_and_handles_of_its_own():
    embedding = Int8Embedding.from_embedding(nn.Embedding(7, 4))
    model = nn.ModuleList([Int8TiedLinear(embedding), embedding])
    other = copy.deepcopy(model)
    assert other[0].weight is other[1].weight is not model[1].weight
    assert other[1].held.module is other[1]
    other[1].weight_codes.zero_()
    assert model[1].weight_codes.any()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded[0].weight is loaded[1].weight
    assert torch.equal(loaded[1].dequantized(), model[1].dequantized())


def test_a_state_dict_holds_codes_and_scales_and_gives_the_bits_back(tmp_path):
    layer = Int8Linear.from_linear(linear(5, 9, dtype=torch.bfloat16))
    assert set(layer.state_dict()) == {"weight_codes", "weight_scales", "bias"}
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = Int8Linear(9, 5, dtype=torch.bfloat16)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 9, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_a_float_state_dict_is_quantised_and_a_missing_scale_is_named():
    float_layer = linear(5, 9)
    layer = Int8Linear(9, 5)
    layer.load_state_dict(float_layer.state_dict())
    assert torch.equal(layer.dequantized(), Int8Linear.from_linear(float_layer).dequantized())
    state = layer.state_dict()
    del state["weight_scales"]
    with pytest.raises(RuntimeError, match="weight_scales"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"\(4, 9\).*\(5, 9\)"):
        layer.load_state_dict(linear(4, 9).state_dict())


@pytest.mark.parametrize("shape", [(512, 1024), (64, 11008), (96, 5632)])
@pytest.mark.parametrize(("scale_dtype", "most"), [(torch.float32, 1.02), (torch.bfloat16, 1.01)])
def test_a_weight_takes_little_more_than_a_byte_in_memory_and_on_disk(shape, scale_dtype, most, tmp_path):
    out, into = shape
    layer = Int8Linear(into, out, bias=False, scale_dtype=scale_dtype)
    storages = {
        buffer.untyped_storage()._cdata: buffer.untyped_storage().nbytes() for buffer in layer.buffers()
    }
    assert sum(storages.values()) == nbytes_of(layer.weight)
    assert sum(storages.values()) <= most * out * into
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    header = 1024
    assert (tmp_path / "layer.safetensors").stat().st_size <= most * out * into + header


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="group_size is 0"):
        Int8Linear(4, 4, group_size=0)
    with pytest.raises(ValueError, match="scale_dtype"):
        Int8Linear(4, 4, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="max_norm"):
        Int8Embedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0))
