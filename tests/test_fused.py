import copy
import pickle

import pytest
import torch
from conftest import OTHER_LAYOUTS, SMALL_LAYOUT, made_model, made_weights
from torch import nn

from ssd import devices, fused
from ssd.boxes import LAYOUTS, PUBLISHED_LAYOUT
from ssd.fused import Conv, _convs, _input_shapes, can_pack, fuse, pack_weights
from ssd.model import SSD, SSD300, set_precision
from ssd.transforms import normalize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(0, 256, (5, 300, 300, 3), generator=torch.Generator().manual_seed(1))
    return normalize(pixels.byte())


def in_published_order(fast, values):
    """Values ``[N, C, B]`` of the fast network in the order of the published default boxes."""
    index = {tuple(box): i for i, box in enumerate(fast.default_boxes.tolist())}
    return values[..., [index[tuple(box)] for box in fast.layout.default_boxes().tolist()]]


def test_all_of_it_is_where_the_model_is():
    fast = fuse(SSD300(3, "resnet18").to("meta"))
    tensors = [*fast.parameters(), *fast.buffers()]
    assert {each.device.type for each in tensors} == {"meta"}
    assert any(each is fast.default_boxes for each in tensors)


def test_it_has_all_default_boxes(small_model):
    boxes = fuse(small_model).default_boxes
    assert sorted(boxes.tolist()) == sorted(PUBLISHED_LAYOUT.default_boxes().tolist())
    assert len({tuple(box) for box in boxes.tolist()}) == 8732


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("head_norm", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_computes_what_the_model_computes(images, head_norm, count, pack):
    model = made_model(head_norm=head_norm)
    fast = fuse(model, pack=pack)
    with torch.inference_mode():
        expected = model(images[:count])
        found = fast(images[:count])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.5
        torch.testing.assert_close(in_published_order(fast, ours), theirs, atol=1e-4, rtol=1e-4)


def test_bottlenecks_too(images):
    model = SSD300(81)
    model.load_state_dict(made_weights({key: value.shape for key, value in model.state_dict().items()}))
    model.eval()
    fast = fuse(model)
    with torch.inference_mode():
        for ours, theirs in zip(fast(images[:2]), model(images[:2]), strict=True):
            difference = (in_published_order(fast, ours) - theirs).abs().max() / theirs.abs().max()
            assert difference < 1e-4


@pytest.mark.parametrize("pack", [True, False])
def test_bf16_is_near(small_model, images, pack):
    fast = fuse(small_model, torch.bfloat16, pack=pack)
    with torch.inference_mode():
        loc, conf = fast(images[:2].bfloat16())
        _, expected = small_model(images[:2])
    assert loc.dtype == conf.dtype == torch.bfloat16
    scores = in_published_order(fast, conf).float().softmax(1)
    assert (scores - expected.softmax(1)).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_a_half_precision_is_not_native_float32_computes_it(small_model, images, monkeypatch, dtype):
    """Inputs, weights and outputs of each convolution are rounded as hardware rounds them, and no sum is."""
    monkeypatch.setattr(fused, "can_pack", lambda *_: False)
    monkeypatch.setattr(devices, "native_precisions", lambda _: ("fp32",))
    plain, fast = fuse(small_model, dtype, pack=False), fuse(small_model, dtype)
    assert plain.stem.weight.dtype == dtype
    assert fast.stem.weight.dtype == torch.float32
    assert torch.equal(fast.stem.weight, plain.stem.weight.float())
    pixels = images[:1].to(dtype)
    with torch.inference_mode():
        ours = fast.stem(pixels)
        convolved = torch.nn.functional.conv2d(
            pixels.double(), plain.stem.weight.double(), plain.stem.bias.double(), 2, 3
        )
        loc, conf = fast(pixels)
        _, expected = small_model(images[:1])
    assert ours.dtype == loc.dtype == conf.dtype == dtype
    torch.testing.assert_close(ours, convolved.relu().to(dtype))
    scores = in_published_order(fast, conf).float().softmax(1)
    assert (scores - expected.softmax(1)).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_model_in_half_precision_is_folded_in_full(small_model, images):
    """As a checkpoint of bf16 weights: what is folded was rounded once, and not twice."""
    half = copy.deepcopy(small_model)
    set_precision(half, "bf16")
    assert fuse(half, pack=False).stem.weight.dtype == torch.bfloat16
    fast = fuse(half, torch.float32)
    with torch.inference_mode():
        _, conf = fast(images[:1])
        _, expected = half.float()(images[:1])
    torch.testing.assert_close(in_published_order(fast, conf), expected, atol=1e-4, rtol=1e-4)


def test_it_can_be_exported_for_any_batch(small_model, images):
    """As examples/tensorrt_detector.py does."""
    fast = fuse(small_model, pack=False)
    dynamic = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(fast, (images[:2],), dynamic_shapes=dynamic).module()
    with torch.inference_mode():
        for count in (1, 5):
            for ours, theirs in zip(program(images[:count]), fast(images[:count]), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_model_stays_as_it_was(small_model):
    model = copy.deepcopy(small_model).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fuse(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_images_are_not_changed(small_model, images):
    before = images.clone()
    with torch.inference_mode():
        fuse(small_model)(images)
    assert torch.equal(images, before)


def test_packing_is_used_here_where_onednn_is():
    """Should torch drop these operations, all would still work, but slower: this is what says so."""
    assert can_pack(CPU, torch.float32) == torch.backends.mkldnn.is_available()
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels", [16, 20])
def test_conv_folds_adds_and_clips(relu, channels):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels).eval()
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x, residual = torch.randn(2, 8, 9, 9), torch.randn(2, channels, 5, 5)
    plain, packed = Conv(conv, norm, relu=relu), Conv(conv, norm, relu=relu)
    packed.pack(tuple(x.shape))
    with torch.inference_mode():
        expected = norm(conv(x))
        torch.testing.assert_close(plain(x), expected.relu() if relu else expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(x)[:, :channels], plain(x), atol=1e-5, rtol=1e-5)
        expected = expected + residual
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(plain(x, residual), expected, atol=1e-5, rtol=1e-5)
        if channels == 16:  # others are filled up, and are only the heads', which add nothing
            torch.testing.assert_close(packed(x, residual.clone()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_another_layout(layout):
    model = made_model(head_norm=True, layout=layout)
    images = torch.randn(2, 3, layout.size, layout.size, generator=torch.Generator().manual_seed(1))
    for pack in (True, False):
        fast = fuse(model, pack=pack)
        assert fast.layout == layout
        with torch.inference_mode():
            for ours, theirs in zip(fast(images), model(images), strict=True):
                assert ours.shape == theirs.shape
                torch.testing.assert_close(in_published_order(fast, ours), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_has_the_weights_that_were_packed(tiny_model, dtype):
    """To the bit, without the channels that only fill up; and it can be packed again."""
    plain, packed = fuse(tiny_model, dtype, pack=False), fuse(tiny_model, dtype)
    small = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        for (name, ours), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs.to(ours.dtype)), name
        pack_weights(other, dtype)
        with torch.inference_mode():
            for ours, theirs in zip(other(small), packed(small), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), SMALL_LAYOUT], ids=[*LAYOUTS, "small"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_weights_are_packed_for_what_each_convolution_takes(backbone, layout):
    fast = fuse(SSD(3, backbone, layout=layout), pack=False)
    seen = {}
    for conv in _convs(fast):
        conv.register_forward_pre_hook(lambda conv, inputs: seen.update({conv: tuple(inputs[0].shape)}))
    with torch.inference_mode():
        fast(torch.zeros(1, 3, layout.size, layout.size))
    assert _input_shapes(fast) == seen
