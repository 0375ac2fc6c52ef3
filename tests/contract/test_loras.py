"""LoRAs with strengths, and adapters of peft, against diffusers' and peft's own loading."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import pipelines
import pytest
import test_pipelines
import torch
from safetensors.torch import load_file, save_file

from invmm.diffusion.guidance import repeated
from invmm.diffusion.sampling import Sampler
from invmm.models.auto import AutoModel
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
KINDS = ["sd1 epsilon", "sdxl", "sd3"]
STRENGTHS = [0.7, -0.4]
SCALE = 3.0


def denoiser_of(pipeline):
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def random_lora(module, targets, *, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Random weights for the layers of a module; it is left as it was."""
    config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, module, "it")
    weights = peft.get_peft_model_state_dict(module, adapter_name="it")
    return {key: value.detach().clone().contiguous() for key, value in weights.items()}


def save_loras(kind: str, folder: Path) -> list[Path]:
    """Two files in diffusers' names, both with weights of the denoiser and a text encoder."""
    files = []
    for seed, rank in ((1, 2), (2, 3)):
        pipeline = pipelines.seeded(pipelines.MAKERS[kind])
        part = denoiser_of(pipeline)
        weights = {}
        for name, module, targets in (
            (part, getattr(pipeline, part), ["to_q", "to_v"] if seed == 1 else ["to_v", "to_k"]),
            ("text_encoder", pipeline.text_encoder, ["q_proj", "out_proj"]),
        ):
            found = random_lora(module, targets, rank=rank, seed=seed)
            weights |= {f"{name}.{key}": value for key, value in found.items()}
        files.append(folder / f"lora-{seed}.safetensors")
        save_file(weights, files[-1])
    return files


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind, folder of the model, two files of LoRA weights)."""
    folder = tmp_path_factory.mktemp("loras")
    pipelines.seeded(pipelines.MAKERS[request.param]).save_pretrained(folder / "model")
    return request.param, folder / "model", save_loras(request.param, folder)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """(folder of a model, two files of LoRA weights)."""
    folder = tmp_path_factory.mktemp("sd")
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(folder / "model")
    return folder / "model", save_loras("sd1 epsilon", folder)


def drawn(network) -> torch.Tensor:
    """Pixels of both rows, as diffusers' loop would draw them."""
    flow = network.schedule.is_flow
    sampler = Sampler(
        scheduler="flow_euler" if flow else "ddim", num_inference_steps=test_pipelines.STEPS,
        timestep_spacing="linspace" if flow else "trailing",
    )  # fmt: skip
    return test_pipelines.ours(network, sampler, test_pipelines.noise_for(network), SCALE)


def merged(pipeline, file: Path, strength: float) -> None:
    """Adds strength * B A to the weights, by hand; alpha is the rank."""
    weights = load_file(file)
    with torch.no_grad():
        for key in [key for key in weights if ".lora_A." in key]:
            name, _, layer = key.partition(".lora_A.")[0].partition(".")
            if not hasattr(pipeline.text_encoder, "text_model"):
                layer = layer.removeprefix("text_model.")
            delta = weights[key.replace("lora_A", "lora_B")] @ weights[key]
            getattr(pipeline, name).get_submodule(layer).weight.add_(strength * delta)


def test_several_loras_with_strengths_equal_the_pipeline(case):
    """Drawn as after load_lora_weights and set_adapters, and as from weights merged by hand."""
    kind, model, files = case
    entries = [{"path": str(f), "weight": w} for f, w in zip(files, STRENGTHS, strict=True)]
    network = LatentPipeline(path=str(model), lora=entries).load(CPU)
    found = drawn(network)

    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["a", "b"], STRENGTHS)
    noise = test_pipelines.noise_for(network)
    expected = test_pipelines.theirs(pipeline, noise, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    by_hand = pipelines.seeded(pipelines.MAKERS[kind])
    for file, strength in zip(files, STRENGTHS, strict=True):
        merged(by_hand, file, strength)
    expected = test_pipelines.theirs(by_hand, noise, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    others = [None, str(files[0]), entries[:1], [*entries[:1], str(files[1])]]
    for lora in others:
        other = drawn(LatentPipeline(path=str(model), lora=lora).load(CPU))
        assert (other - found).abs().max() > 1e-3, lora
    assert not any(parameter.requires_grad for parameter in network.denoiser.parameters())


def test_one_file_is_the_same_as_a_list_of_it_and_weight_0_as_none(sd):
    model, (file, _) = sd
    plain = LatentPipeline(path=str(model), lora=str(file))
    listed = LatentPipeline(path=str(model), lora=[{"path": str(file), "weight": 1}])
    torch.testing.assert_close(drawn(plain.load(CPU)), drawn(listed.load(CPU)), rtol=0, atol=0)
    assert plain.fingerprint() == listed.fingerprint()
    off = LatentPipeline(path=str(model), lora=[{"path": str(file), "weight": 0}])
    none = LatentPipeline(path=str(model))
    torch.testing.assert_close(drawn(off.load(CPU)), drawn(none.load(CPU)), rtol=0, atol=1e-6)


def test_alpha_of_kohya_counts(sd, tmp_path):
    """alpha/rank is the scale of its files; other names for the same weights without it."""
    model, (file, _) = sd
    kohya, halved = {}, {}
    for key, value in load_file(file).items():
        part, _, layer = key.partition(".")
        layer, _, matrix = layer.partition(".lora_")
        if part == "unet":
            name = f"lora_unet_{layer.replace('.', '_')}"
            kohya[f"{name}.lora_{'down' if matrix[0] == 'A' else 'up'}.weight"] = value
            kohya[f"{name}.alpha"] = torch.tensor(1.0)  # of rank 2
            halved[key] = value / 2 if matrix[0] == "B" else value
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(halved, tmp_path / "halved.safetensors")
    found, expected = (
        drawn(LatentPipeline(path=str(model), lora=[{"path": str(path), "weight": 0.6}]).load(CPU))
        for path in (tmp_path / "kohya.safetensors", tmp_path / "halved.safetensors")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - drawn(LatentPipeline(path=str(model)).load(CPU))).abs().max() > 1e-3


def test_the_fingerprint_tells_files_and_strengths_apart(sd):
    model, files = sd
    one, two = map(str, files)

    def fingerprint(lora):
        found = LatentPipeline(path=str(model), lora=lora).fingerprint()
        return {key: value for key, value in found.items() if key.startswith("lora")}

    sha256 = hashlib.sha256(Path(one).read_bytes()).hexdigest()
    assert fingerprint(None) == {}
    assert fingerprint(one) == {"lora": sha256}
    assert fingerprint([{"path": one, "weight": 0.5}]) == {
        "lora.0": sha256, "lora.0 weight": "0.5"
    }  # fmt: skip
    assert fingerprint([one, two])["lora.0 weight"] == "1.0"
    different = [[one, two], [two, one], [one, {"path": two, "weight": 2}], [one], [two]]
    assert len({json.dumps(fingerprint(lora), sort_keys=True) for lora in different}) == 5


# Adapters of peft -------------------------------------------------------------------------------

OPTIONS = {
    "alpha": {"r": 4, "lora_alpha": 1},
    "gaussian": {"r": 2, "lora_alpha": 6, "init_lora_weights": "gaussian"},
    "patterns": {
        "r": 2, "lora_alpha": 3, "rank_pattern": {"to_v": 4}, "alpha_pattern": {"attn2.to_q": 9},
    },
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "a regular expression": {"r": 2, "lora_alpha": 1, "target_modules": r".*attn1\.to_(q|out\.0)"},
    "convolutions": {"r": 2, "lora_alpha": 1, "target_modules": ["conv1", "to_q", "proj_in"]},
}  # fmt: skip


def save_peft(kind: str, folder: Path, **options):
    """An adapter with random weights, saved by peft itself."""
    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    part = denoiser_of(pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tuned = peft.get_peft_model(
            getattr(pipeline, part),
            peft.LoraConfig(**{"target_modules": ["to_q", "to_v"], **options}),
        )
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return folder


def inputs_of(network):
    condition = repeated(network.condition("a red fox"), 2)
    return test_pipelines.noise_for(network), torch.tensor([900, 30]), condition


@pytest.mark.parametrize(("kind", "option"), [
    *(("sd1 epsilon", option) for option in OPTIONS), ("sdxl", "patterns"), ("sd3", "alpha"),
])  # fmt: skip
def test_an_adapter_of_peft_equals_its_own_forward(kind, option, tmp_path):
    folder = save_peft(kind, tmp_path / "adapter", **OPTIONS[option])
    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    pipeline.save_pretrained(tmp_path / "model")
    network = LatentPipeline(path=str(tmp_path / "model"), lora=str(folder)).load(CPU)
    latents, timesteps, condition = inputs_of(network)
    own = peft.PeftModel.from_pretrained(getattr(pipeline, denoiser_of(pipeline)), str(folder))
    with torch.no_grad():
        found = network.predict(latents, timesteps, condition)
        expected = network.evaluate(own.eval(), latents, timesteps, condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    plain = LatentPipeline(path=str(tmp_path / "model")).load(CPU)
    with torch.no_grad():
        assert (plain.predict(latents, timesteps, condition) - found).abs().max() > 1e-3


def test_an_adapter_of_peft_in_half_precision(tmp_path):
    """In that of the model, as diffusers loads LoRAs; peft does if it is told to."""
    folder = save_peft("sd1 epsilon", tmp_path / "adapter", r=4, lora_alpha=1)
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.save_pretrained(tmp_path / "model")
    network = LatentPipeline(
        path=str(tmp_path / "model"), lora=str(folder), dtype="bfloat16"
    ).load(CPU)  # fmt: skip
    latents, timesteps, condition = inputs_of(network)
    own = peft.PeftModel.from_pretrained(
        pipeline.unet.to(torch.bfloat16), str(folder), autocast_adapter_dtype=False
    ).eval()
    half = {name: value.to(torch.bfloat16) for name, value in condition.items()}
    with torch.no_grad():
        found = network.predict(latents, timesteps, condition)
        expected = network.evaluate(own, latents.to(torch.bfloat16), timesteps, half)
    assert torch.equal(found, expected.float())
    assert {value.dtype for value in network.denoiser.parameters()} == {torch.bfloat16}


def test_an_adapter_of_peft_beside_a_lora_of_diffusers(sd, tmp_path):
    """The file in its folder is the same, and its strength multiplies its scale."""
    model, (file, _) = sd
    folder = save_peft("sd1 epsilon", tmp_path / "adapter", r=4, lora_alpha=1)
    one = LatentPipeline(
        path=str(model), lora=[str(file), {"path": str(folder), "weight": -0.5}]
    ).load(CPU)  # fmt: skip
    weights = load_file(folder / "adapter_model.safetensors")
    scaled = {
        f"unet.{key.removeprefix('base_model.model.')}": value * (-0.125 if "lora_B" in key else 1)
        for key, value in weights.items()
    }
    save_file(scaled, tmp_path / "scaled.safetensors")
    other = LatentPipeline(
        path=str(model), lora=[str(tmp_path / "scaled.safetensors"), str(file)]
    ).load(CPU)  # fmt: skip
    torch.testing.assert_close(drawn(one), drawn(other), rtol=0, atol=1e-5)
    as_folder, as_file = (
        LatentPipeline(path=str(model), lora=str(path)).fingerprint()
        for path in (folder, folder / "adapter_model.safetensors")
    )
    assert as_folder == as_file
    assert {"lora", "lora adapter_config.json"} <= as_file.keys()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2}))
    changed = LatentPipeline(path=str(model), lora=str(folder)).fingerprint()
    assert changed["lora"] == as_file["lora"]
    assert changed["lora adapter_config.json"] != as_file["lora adapter_config.json"]


def edited(**changes):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def reweighted(change):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


PEFT_FAULTS = {
    "dora": (edited(use_dora=True), "use_dora=True in its adapter_config.json"),
    "bias": (edited(bias="all"), "bias=all in its adapter_config.json"),
    "bias of LoRA": (edited(lora_bias=True), "lora_bias=True"),
    "whole layers": (edited(modules_to_save=["conv_in"]), r"modules_to_save=\['conv_in'\]"),
    "another kind": (edited(peft_type="LOHA"), "peft_type=LOHA in its .*; supported is LORA"),
    "start of another base": (edited(init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "option of another release": (edited(new_option=3), "new_option=3 in its"),
    "no rank": (edited(r=None), "r=None in its .*; an integer of 1 or more"),
    "rank that is no number": (edited(r="8"), "r=8 in its .*; an integer of 1 or more"),
    "no alpha": (edited(lora_alpha=float("nan")), "lora_alpha=nan in its .*; a finite number"),
    "pattern": (edited(alpha_pattern={"to_q": None}), "alpha_pattern={'to_q': None}"),
    "pattern of ranks": (edited(rank_pattern={"to_q": 0.5}), "rank_pattern={'to_q': 0.5}"),
    "rslora of no kind": (edited(use_rslora=3), "use_rslora=3"),
    "another rank": (edited(r=5), "cannot be loaded: .*size mismatch"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "was written by peft .*put that file beside it",
    ),
    "a pickle": (pickled, "a pickle is never loaded"),
    "foreign layer": (
        reweighted(lambda old: {k.replace("to_q", "to_x"): v for k, v in old.items()}),
        r"weights of down_blocks\S*to_x, and the unet of this model has no such layer",
    ),
    "foreign weight": (
        reweighted(lambda old: {**old, "base_model.model.conv_in.bias": torch.zeros(8)}),
        "holds base_model.model.conv_in.bias, which is no LoRA weight",
    ),
    "not by peft": (
        reweighted(lambda old: {**old, "unet.x.lora_A.weight": torch.zeros(8, 2)}),
        r"holds unet\.x\.lora_A\.weight, which is no LoRA weight",
    ),
    "infinite": (
        reweighted(lambda old: {k: v / 0 for k, v in old.items()}), "NaN or infinite weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_an_adapter_that_asks_for_more_is_refused_before_weights_load(fault, sd, tmp_path):
    model, _ = sd
    change, message = PEFT_FAULTS[fault]
    folder = save_peft("sd1 epsilon", tmp_path / "adapter", r=4, lora_alpha=1)
    change(folder)
    path = folder / "adapter_model.safetensors" if fault == "no config" else folder
    recipe = LatentPipeline(path=str(model), lora=str(path))
    for action in (
        recipe.try_out,
        lambda: recipe.call_cost(1, Execution()),
        lambda: recipe.load(CPU),
    ):
        with pytest.raises(ValueError, match=rf"^model\.lora=.*{message}.*$") as caught:
            action()
        assert "\n" not in str(caught.value)


# Faults -----------------------------------------------------------------------------------------

SETTINGS = {
    "empty": ([], r"model\.lora=\[\] names no file"),
    "number": ([3], r"model\.lora\.0=3 is not possible: give a path"),
    "unknown key": ([{"path": "a", "wieght": 1}], r"model\.lora\.0\.wieght=1 is not a key"),
    "no path": (["a", {"weight": 1}], r"model\.lora\.1\.path=None is not possible"),
    "word": ([{"path": "a", "weight": "big"}], r"model\.lora\.0\.weight=big is not possible"),
    "true": ([{"path": "a", "weight": True}], r"model\.lora\.0\.weight=True is not possible"),
    "infinite": (
        [{"path": "a", "weight": float("inf")}],
        r"model\.lora\.0\.weight=inf is not po",
    ),
    "nan": ([{"path": "a", "weight": float("nan")}], r"model\.lora\.0\.weight=nan is not possible"),
    "huge": ([{"path": "a", "weight": 10**400}], r"model\.lora\.0\.weight=1000\d+ is not p"),
}


@pytest.mark.parametrize("fault", SETTINGS)
@pytest.mark.parametrize("recipe", [LatentPipeline, AutoModel])
def test_a_list_that_is_no_list_of_files_is_refused_at_once(fault, recipe):
    setting, message = SETTINGS[fault]
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        recipe(path="somewhere", lora=setting)


def test_a_fault_of_the_libraries_is_noticed(sd, monkeypatch):
    """That a further file changes the weights of the first, or a strength does not arrive."""
    model, files = sd
    recipe = LatentPipeline(path=str(model), lora=[str(file) for file in files])
    pipeline_class = diffusers.StableDiffusionPipeline
    load = pipeline_class.load_lora_weights

    for changed in ("q_proj.lora_A.default_0", "q_proj.base_layer"):

        def loaded(self, *arguments, adapter_name, changed=changed, **options):
            load(self, *arguments, adapter_name=adapter_name, **options)
            if adapter_name == "default_1":
                weight = f"encoder.layers.0.self_attn.{changed}.weight"
                dict(self.text_encoder.named_parameters())[weight].data.add_(1)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_class, "load_lora_weights", loaded)
            name = changed.replace(".base_layer", "")
            with pytest.raises(ValueError, match=rf"^model\.lora\.1=.* changed text_.*\.{name}\."):
                recipe.load(CPU)
    monkeypatch.setattr(pipeline_class, "set_adapters", lambda self, names, weights: None)
    assert recipe.load(CPU)  # strengths of 1 are there without it
    halved = [{"path": str(files[0]), "weight": 0.5}]
    with pytest.raises(
        ValueError, match=r"^model\.lora: text_encoder\..* is scaled by 1\.0 instead of 0\.5"
    ):
        LatentPipeline(path=str(model), lora=halved).load(CPU)


def test_each_file_of_a_list_is_checked(sd, tmp_path):
    """By its place in the list, in a dry run (`describe`, `call_cost`) as in a run."""
    model, (one, two) = sd
    copy = shutil.copy(one, tmp_path / "copy.safetensors")
    (tmp_path / "link.safetensors").symlink_to(one)
    (tmp_path / "damaged.safetensors").write_bytes(b"{")
    (tmp_path / "pickle.bin").write_bytes(b"")
    weights = load_file(one)
    save_file({k.replace("unet.", "other."): v for k, v in weights.items()}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "prefix.safetensors")
    key = next(k for k in weights if "unet" in k and "lora_A" in k)
    for name, value in (("wide", torch.zeros(2, 99)), ("nan", weights[key] * float("nan"))):
        save_file({**weights, key: value}, tmp_path / f"{name}.safetensors")

    def recipe(path):
        return LatentPipeline(path=str(model), lora=[str(two), str(path)])

    for name, message in {
        str(two): "is the file that model.lora.0=.* names; name it once",
        "nowhere.safetensors": "does not exist",
        "": "is a folder",
        "pickle.bin": "is no safetensors file",
    }.items():
        with pytest.raises(ValueError, match=rf"^model\.lora\.1=.* {message}"):
            recipe(tmp_path / name).describe()
    with pytest.raises(ValueError, match=r"^model\.lora\.1=.* is the file that model\.lora\.0="):
        LatentPipeline(path=str(model), lora=[str(one), str(tmp_path / "link.safetensors")]).load(
            CPU
        )
    for name, message in {
        "damaged": "is damaged", "prefix": "keys begin with other, text_encoder|begin with other",
        "wide": "cannot be loaded: .*size mismatch", "nan": "holds NaN or infinite weights",
    }.items():  # fmt: skip
        for action in ("try_out", "call_cost", "load"):
            arguments = {"try_out": (), "call_cost": (1, Execution()), "load": (CPU,)}[action]
            with pytest.raises(ValueError, match=rf"^model\.lora\.1=.*({message})") as caught:
                getattr(recipe(tmp_path / f"{name}.safetensors"), action)(*arguments)
            assert "\n" not in str(caught.value)
    recipe(copy).try_out()


def test_families_without_text_take_no_lora(tmp_path):
    pipelines.seeded(pipelines.MAKERS["dit"]).save_pretrained(tmp_path)
    for recipe in (LatentPipeline, AutoModel):
        with pytest.raises(ValueError, match=r"^model\.lora=x has no meaning for a DiTPipeline"):
            recipe(path=str(tmp_path), lora="x").describe()


def test_a_call_with_loras_costs_more(sd):
    model, files = sd
    plain = LatentPipeline(path=str(model)).call_cost(2, Execution())
    tuned = LatentPipeline(path=str(model), lora=list(map(str, files))).call_cost(2, Execution())
    assert plain.flop < tuned.flop < 1.5 * plain.flop
    weights = sum(value.numel() for file in files for value in load_file(file).values())
    assert tuned.weight_bytes - plain.weight_bytes == 4 * weights
