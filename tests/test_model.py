import copy
import hashlib
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OTHER_LAYOUTS, SMALL_LAYOUT, made_model, made_weights
from torch._subclasses import FakeTensorMode
from training import assert_equal

from ssd import checkpoint, pretrained
from ssd.boxes import LAYOUTS, PUBLISHED_LAYOUT
from ssd.devices import native_precisions
from ssd.errors import CheckpointError, DownloadError
from ssd.model import SSD, load_model, set_precision, transfer

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@pytest.fixture(scope="module")
def images():
    """The input of the figures."""
    return torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (2, 3, 300, 300)).astype(np.float32))


def published_weights(checkpoint_keys, backbone):
    return made_weights({key: tuple(shape) for key, shape, _ in checkpoint_keys[backbone]})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_state_dict_of_plain_heads_is_the_published_one(checkpoint_keys, backbone):
    with torch.device("meta"):
        state = SSD(backbone=backbone, head_norm=False).state_dict()
    ours = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()]
    assert ours == checkpoint_keys[backbone]


def _first_maps(model, images, count):
    """The outputs of `SSD.at_half_size`, put together from the whole network's parts."""
    maps = [model.feature_extractor(images)]
    for block in list(model.additional_blocks)[: count - 1]:
        maps.append(block(maps[-1]))
    heads = (model.loc, model.loc_norm), (model.conf, model.conf_norm)
    return [
        torch.cat(
            [norms[i](convs[i](each)).unflatten(1, (k, -1)).flatten(2) for i, each in enumerate(maps)], 2
        )
        for (convs, norms), k in zip(heads, (4, model.num_classes), strict=True)
    ]


@pytest.mark.parametrize(("layout", "maps"), [("300", 5), ("512", 5), ("small", 2)])
def test_at_half_size_it_is_the_network_without_its_last_maps(layout, maps):
    model = made_model(layout=OTHER_LAYOUTS.get(layout, PUBLISHED_LAYOUT), head_norm=True)
    part = model.at_half_size()
    images = torch.randn(2, 3, part.layout.size, part.layout.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loc, conf = part(images)
        wanted = _first_maps(model, images, maps)
    assert loc.shape[2] == conf.shape[2] == part.layout.num_default_boxes
    torch.testing.assert_close([loc, conf], wanted)
    whole = dict(model.named_parameters())
    assert all(whole[name] is parameter for name, parameter in part.named_parameters())
    assert len(part.loc) == len(part.conf_norm) == maps < len(model.loc)


@pytest.mark.parametrize("head_norm", [False, True], ids=["plain heads", "normed heads"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_figures(figures, checkpoint_keys, images, backbone, head_norm):
    model = SSD(backbone=backbone, head_norm=head_norm).eval()
    result = model.load_state_dict(published_weights(checkpoint_keys, backbone), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    with torch.no_grad():
        loc, conf = model(images)
    assert loc.shape == (2, 4, 8732)
    assert conf.shape == (2, 81, 8732)
    pick = figures[f"{backbone}/pick"]
    for ours, name in ((loc, "loc"), (conf, "conf")):
        expected = figures[f"{backbone}/{name}"]
        scale = np.abs(expected).mean()
        np.testing.assert_allclose(ours[:, :, pick] / scale, expected / scale, atol=2e-5, rtol=1e-5)
    means = [float(loc.abs().mean()), float(conf.abs().mean())]
    np.testing.assert_allclose(means, figures[f"{backbone}/abs_mean"], rtol=1e-5)


@torch.no_grad()
def test_a_published_state_dict_gives_equal_outputs_with_and_without_head_norms(checkpoint_keys, images):
    weights = published_weights(checkpoint_keys, "resnet18")
    before = {key: value.clone() for key, value in weights.items()}
    plain = SSD(backbone="resnet18", head_norm=False).eval()
    normed = SSD(backbone="resnet18").eval()
    plain.load_state_dict(weights)
    normed.load_state_dict(weights)
    for a, b in zip(plain(images), normed(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], before[key]) for key in before)


def test_loading_published_weights_resets_norms_that_were_trained():
    model = SSD(3, "resnet18")
    torch.nn.init.constant_(model.conf_norm[0].weight, 5)
    model.load_state_dict(SSD(3, "resnet18", head_norm=False).state_dict())
    assert (model.conf_norm[0].weight == 1).all()


def test_loading_a_part_leaves_trained_head_norms_alone():
    model = SSD(3, "resnet18")
    torch.nn.init.constant_(model.loc_norm[0].weight, 5)
    model.load_state_dict({"loc.1.bias": torch.zeros_like(model.loc[1].bias)}, strict=False)
    assert (model.loc_norm[0].weight == 5).all()


def test_an_empty_batch(small_model):
    loc, conf = small_model(torch.zeros(0, 3, 300, 300))
    assert (loc.shape, conf.shape) == ((0, 4, 8732), (0, 4, 8732))


def test_a_state_dict_with_some_head_norms_missing_is_refused():
    state = SSD(3, "resnet18").state_dict()
    del state["loc_norm.2.bias"]
    with pytest.raises(RuntimeError, match=r"loc_norm\.2\.bias"):
        SSD(3, "resnet18").load_state_dict(state)


def test_a_batch_norm_follows_each_of_the_twelve_head_convolutions():
    model = SSD(5, "resnet18")
    assert [norm.num_features for norm in model.loc_norm] == [conv.out_channels for conv in model.loc]
    assert [norm.num_features for norm in model.conf_norm] == [conv.out_channels for conv in model.conf]
    called = []
    for norm in (*model.loc_norm, *model.conf_norm):
        norm.register_forward_hook(lambda *_: called.append(1))
    model(torch.zeros(2, 3, 300, 300))
    assert len(called) == 12


def test_size_as_published():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SSD(head_norm=False).parameters())
    assert round(parameters / 1e6, 1) == 22.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet5"}, "resnet5"),
        ({"num_classes": 1}, "counts the background"),
        ({"backbone": "resnet18", "backbone_weights": "IMAGENET1K_V9"}, "IMAGENET1K_V1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SSD(**arguments)


# --- Precision ---


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("bf16", 0.05)])
@torch.no_grad()
def test_half_precision_keeps_norms_in_float32_and_stays_close(small_model, images, precision, error):
    half = copy.deepcopy(small_model)
    set_precision(half, precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for module in half.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.dtype == dtype
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert {each.dtype for each in (module.weight, module.running_var)} == {torch.float32}
    for ours, expected in zip(half(images[:1].to(dtype)), small_model(images[:1]), strict=True):
        assert ours.dtype == dtype
        assert (ours - expected).abs().mean() < error * expected.abs().mean()


def test_head_norms_work_in_half_precision():
    model = made_model(head_norm=True)
    set_precision(model, "bf16")
    with torch.no_grad():
        loc, _ = model(torch.zeros(1, 3, 300, 300, dtype=torch.bfloat16))
    assert loc.isfinite().all()


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match="fp8"):
        set_precision(SSD(2, "resnet18"), "fp8")


def test_fp32_is_native_everywhere():
    assert native_precisions(torch.device("cpu"))[0] == "fp32"
    assert native_precisions(torch.device("meta")) == ("fp32",)


# --- Graphs ---


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("head_norm", [False, True])
@torch.no_grad()
def test_script(images, head_norm):
    model = made_model(head_norm=head_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so for each of its functions
        scripted = torch.jit.script(model)
    for ours, expected in zip(scripted(images), model(images), strict=True):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_export_with_any_batch_size(small_model, images):
    batch = torch.export.Dim("batch")
    program = torch.export.export(small_model, (images,), dynamic_shapes=({0: batch},))
    more = torch.cat([images, images, images])
    for ours, expected in zip(program.module()(more), small_model(more), strict=True):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_compile_in_one_graph(small_model, images):
    # The eager backend traces the whole graph, as inductor would, but needs no C++ compiler.
    compiled = torch.compile(copy.deepcopy(small_model), fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(images), small_model(images), strict=True):
        torch.testing.assert_close(ours, expected)


# --- Devices ---


@pytest.mark.parametrize("head_norm", [False, True])
def test_forward_under_fake_cuda_tensors(head_norm):
    with FakeTensorMode(), torch.device("cuda"):
        model = SSD(3, "resnet18", head_norm)
        loc, conf = model(torch.zeros(2, 3, 300, 300))
        assert (loc.device.type, conf.device.type) == ("cuda", "cuda")
        with pytest.raises(Exception, match=r"(?i)device"):
            model(torch.zeros(2, 3, 300, 300, device="cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
@torch.no_grad()
def test_a_real_gpu_gives_what_the_cpu_gives(small_model, images, precision, dtype):
    model = copy.deepcopy(small_model).cuda()
    set_precision(model, precision)
    for ours, expected in zip(model(images.cuda().to(dtype)), small_model(images), strict=True):
        assert (ours.float().cpu() - expected).abs().mean() < 0.01 * expected.abs().mean()


# --- Loading ---


@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_model_reads_the_network_off_the_file(tmp_path, backbone):
    with torch.device("meta"):
        state = SSD(3, backbone, head_norm=False).state_dict()
    path = tmp_path / "weights.pt"
    torch.save({"model": {key: torch.zeros_like(value, device="cpu") for key, value in state.items()}}, path)
    model, found = load_model(path)
    assert (model.backbone, model.num_classes, model.head_norm) == (backbone, 3, False)
    assert found.class_names == ("class 0", "class 1")


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path, images, suffix, head_norm):
    model = made_model(head_norm=head_norm)
    path = tmp_path / f"model{suffix}"
    checkpoint.save(path, model.state_dict(), ("a", "b", "c"))
    loaded, found = load_model(path)
    assert loaded.head_norm == head_norm
    assert found.class_names == ("a", "b", "c")
    assert loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    for ours, expected in zip(loaded.eval()(images), model(images), strict=True):
        assert torch.equal(ours, expected)


def test_weights_saved_in_half_precision_are_loaded_as_float32(tmp_path, small_model):
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in small_model.state_dict().items()
    }
    checkpoint.save(tmp_path / "half.safetensors", half, ("a", "b", "c"))
    model, _ = load_model(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_plain_model_is_saved_as_the_published_code_expects(tmp_path, checkpoint_keys):
    path = tmp_path / "model.pt"
    checkpoint.save(path, SSD(backbone="resnet18", head_norm=False).state_dict(), tuple(map(str, range(80))))
    saved = torch.load(path, weights_only=True)
    assert [key for key, *_ in checkpoint_keys["resnet18"]] == list(saved["model"])
    assert saved["label_map"][0] == "background"


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_load_model_names_what_does_not_fit(tmp_path, small_model, fault):
    state = dict(small_model.state_dict())
    if fault == "missing":
        del state["loc.5.bias"]
    elif fault == "unexpected":
        state["loc.6.bias"] = torch.zeros(1)
    else:
        state["loc.5.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt does not fit .*loc\.[56]\.bias"):
        load_model(tmp_path / "bad.pt")


# --- Another start ---


NAMES = ("cat", "cup", "person")
ALL = "trunk; additional blocks; loc; conf"


def assert_loaded(model, old, is_loaded):
    """That the parts of a model are a state dict's, or not, as a function of the key says."""
    parameters = {key: value for key, value in model.state_dict().items() if key.endswith("weight")}
    for key, value in parameters.items():
        assert (key in old and torch.equal(value, old[key])) == is_loaded(key), key


def test_other_classes_keep_all_but_the_class_heads(weights_file, small_model):
    model, line = transfer(weights_file, ("a", "b"))
    old = small_model.state_dict()
    assert (model.num_classes, model.head_norm) == (3, False)  # plain heads, as the checkpoint's
    assert_loaded(model, old, lambda key: not key.startswith("conf"))
    kept = sum(not key.startswith("conf") for key in old)
    assert line == (
        f"SSD300 resnet18 from {weights_file}: loaded {kept} tensors (trunk; additional blocks; loc); "
        "new: conf (other classes than its 3)"
    )


def test_other_names_of_as_many_classes_are_other_classes(weights_file, small_model):
    model, _ = transfer(weights_file, ("cat", "person", "cup"))
    assert_loaded(model, small_model.state_dict(), lambda key: not key.startswith("conf"))


def test_the_same_classes_keep_everything(weights_file, small_model):
    model, line = transfer(weights_file, NAMES)
    assert_equal(model.state_dict(), small_model.state_dict())
    assert line.endswith(f"loaded {len(model.state_dict())} tensors ({ALL}); new: nothing")


def test_another_backbone_than_the_checkpoints(weights_file):
    with pytest.raises(ValueError, match="has the backbone resnet18, not resnet50"):
        transfer(weights_file, ("a",), backbone="resnet50")


@pytest.mark.parametrize("same_classes", [True, False])
def test_weights_of_300_pixels_start_a_network_of_512(tmp_path, same_classes):
    """Heads 4 have 4 boxes a cell at 300 and 6 at 512, and only 512 has a seventh map."""
    old = made_model(head_norm=True)
    checkpoint.save(tmp_path / "w.pt", old.state_dict(), NAMES)
    model, line = transfer(tmp_path / "w.pt", NAMES if same_classes else ("a",), layout=LAYOUTS["512"])
    assert (model.layout, model.head_norm) == (LAYOUTS["512"], True)

    def is_loaded(key):
        module, number = key.split(".")[:2]
        if module == "feature_extractor":
            return True
        if module == "additional_blocks":
            return number != "5"
        return number in "01235" and (same_classes or module.startswith("loc"))

    assert_loaded(model, old.state_dict(), is_loaded)
    for norm in (model.loc_norm[4], model.loc_norm[6], model.conf_norm[6]):  # as new
        assert (norm.weight == 1).all()
        assert (norm.running_mean == 0).all()
    kept = sum(is_loaded(key) for key in model.state_dict())
    conf, new_conf = ("; conf 0, 1, 2, 3, 5", "4, 6") if same_classes else ("", "(other classes than its 3)")
    assert line == (
        f"SSD512 resnet18 from {tmp_path / 'w.pt'} (SSD300): loaded {kept} tensors "
        f"(trunk; additional blocks 0, 1, 2, 3, 4; loc 0, 1, 2, 3, 5{conf}); "
        f"new: additional blocks 5; loc 4, 6; conf {new_conf}"
    )


def test_weights_of_512_pixels_start_a_network_of_300(tmp_path):
    old = made_model(layout=LAYOUTS["512"])
    checkpoint.save(tmp_path / "w.pt", old.state_dict(), NAMES, layout=LAYOUTS["512"])
    assert transfer(tmp_path / "w.pt", ("a",))[0].layout == LAYOUTS["512"]
    model, line = transfer(tmp_path / "w.pt", NAMES, layout=LAYOUTS["300"])
    assert_loaded(model, old.state_dict(), lambda key: key not in ("loc.4.weight", "conf.4.weight"))
    assert line.endswith("new: loc 4; conf 4")


@torch.no_grad()
def test_other_scales_and_ratios_keep_everything(tmp_path, tiny_model):
    checkpoint.save(tmp_path / "w.pt", tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    layout = replace(SMALL_LAYOUT, scales=(9, 20, 40, 60, 90), aspect_ratios=((3,), (1.5, 2), (4,), ()))
    model, line = transfer(tmp_path / "w.pt", NAMES, layout=layout)
    assert f" (another layout): loaded {len(model.state_dict())} tensors ({ALL}); new: nothing" in line
    assert model.layout == layout
    images = torch.rand(1, 3, 96, 96)
    for ours, theirs in zip(model.eval()(images), tiny_model(images), strict=True):
        assert torch.equal(ours, theirs)


def test_published_checkpoints_are_what_training_starts_from(tmp_path, images):
    """The published function: plain heads, and the same outputs in eval mode."""
    model = made_model(num_classes=5)
    checkpoint.save(tmp_path / "published.pt", model.state_dict(), ("a", "b", "c", "d"))
    started, _ = transfer(tmp_path / "published.pt", ("a", "b", "c", "d"))
    with torch.no_grad():
        for ours, theirs in zip(started.eval()(images), model(images), strict=True):
            assert torch.equal(ours, theirs)
    assert load_model(tmp_path / "published.pt")[1].num_classes == 5


# --- Backbone weights ---


def torchvision_resnet18():
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(made_weights({key: value.shape for key, value in model.state_dict().items()}))
    return model.eval()


@torch.no_grad()
def test_backbone_weights_from_a_file_give_torchvisions_features(tmp_path):
    resnet = torchvision_resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    trunk = SSD(2, "resnet18", backbone_weights=tmp_path / "resnet18.pth").eval().feature_extractor
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))))
    assert torch.equal(trunk.feature_extractor[:6](images), expected)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"epoch": 90, "arch": "resnet18", "state_dict": state},
        lambda state: {f"module.encoder.{key}": value for key, value in state.items()},
        lambda state: {"state_dict_ema": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    ],
)
def test_backbone_weights_in_containers_of_others(tmp_path, wrapped):
    state = torchvision_resnet18().state_dict()
    torch.save(wrapped(state), tmp_path / "resnet18.pth")
    model = SSD(2, "resnet18", backbone_weights=tmp_path / "resnet18.pth")
    assert torch.equal(
        model.feature_extractor.feature_extractor[4][0].conv1.weight, state["layer1.0.conv1.weight"]
    )


def test_a_whole_network_is_no_backbone(tmp_path, small_model):
    torch.save(small_model.state_dict(), tmp_path / "ssd.pth")
    with pytest.raises(CheckpointError, match=r"not a ResNet with torchvision's names; .* by --weights"):
        SSD(2, "resnet18", backbone_weights=tmp_path / "ssd.pth")


def test_backbone_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision_resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        SSD(2, "resnet34", backbone_weights=tmp_path / "resnet18.pth")


def test_imagenet_weights_are_fetched_by_name_and_checked(tmp_path, server, monkeypatch):
    torch.save(torchvision_resnet18().state_dict(), tmp_path / "resnet18.pth")
    body = (tmp_path / "resnet18.pth").read_bytes()
    url = server.serve(f"/resnet18-{hashlib.sha256(body).hexdigest()[:8]}.pth", body)
    monkeypatch.setitem(
        pretrained.BACKBONE_WEIGHTS, "resnet18", {"IMAGENET1K_V1": "https://x.org/old", "V2": url}
    )
    model = SSD(2, "resnet18", backbone_weights="imagenet")
    expected = torchvision_resnet18().conv1.weight
    assert torch.equal(model.feature_extractor.feature_extractor[0].weight, expected)
    server.serve(f"/{url.rsplit('/', 1)[1]}", body[:-1] + b"x")
    (pretrained.cache_dir() / url.rsplit("/", 1)[1]).unlink()
    with pytest.raises(DownloadError, match="SHA-256"):
        SSD(2, "resnet18", backbone_weights="imagenet")
