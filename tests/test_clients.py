"""What others' tools do with our models: outputs, and clients such as transformers' Trainer.

Each test of a client skips where its package is not installed; pip install '.[clients]' has all.
"""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from common import randn, random_picture, tiny_backbone, tiny_classifier
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitmsn import (
    ACTIVATIONS,
    TRACES_DICTS,
    ModelOutput,
    ViTMSNClassifierOutput,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModelOutput,
    preprocess,
    to_original,
    to_transformers,
)

IMAGES = randn(2, 3, 32, 32)
LABELS = torch.tensor([1, 4])
FIELDS = ["loss", "logits", "hidden_states", "attentions"]

# -- outputs ---------------------------------------------------------------------------------------


@given(present=st.lists(st.sampled_from(FIELDS), unique=True))
def test_outputs_answer_by_attribute_key_and_position(present):
    """What is not None is there by name, by key and by position, in the order of the fields."""
    values = {name: torch.tensor(float(place)) for place, name in enumerate(FIELDS)}
    out = ViTMSNClassifierOutput(**{name: values[name] for name in present})
    there = [name for name in FIELDS if name in present]
    assert out.keys() == list(out) == list(dict(out)) == there
    assert len(out) == len(out.to_tuple()) == len(there)
    for place, name in enumerate(there):
        assert out[place] is out[name] is getattr(out, name) is out.get(name) is values[name]
    for name in set(FIELDS) - set(there):
        assert name not in out and out.get(name, 3) == 3 and getattr(out, name) is None
        with pytest.raises(KeyError):
            out[name]
    assert out[:2] == out.to_tuple()[:2] == tuple(out.values())[:2]
    assert dict(out.items()) == {**out} == {name: values[name] for name in there}


def test_the_loss_comes_first_when_there_are_labels():
    """out[0] is the loss with labels and the logits without, as Trainer expects."""
    model = tiny_classifier().eval()
    out = model(IMAGES, labels=LABELS)
    assert out[0] is out.loss and out[1] is out.logits
    assert model(IMAGES)[0].shape == (2, 5)
    assert isinstance(out, dict) == TRACES_DICTS


def test_return_dict_false_gives_a_tuple():
    """return_dict is taken by both models; False gives the same tensors as a tuple."""
    loss, logits = tiny_classifier().eval()(IMAGES, labels=LABELS, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 5)
    (state,) = tiny_backbone().eval()(IMAGES, return_dict=False)
    assert_close(state, tiny_backbone().eval()(IMAGES, return_dict=True).last_hidden_state)


def test_a_field_that_is_set_is_set_in_every_view():
    """Attribute, key and position never tell different stories."""
    out = ViTMSNClassifierOutput(logits=torch.zeros(2))
    out.loss = torch.tensor(1.0)
    assert out["loss"] is out[0] is out.loss
    out["loss"] = torch.tensor(2.0)
    assert out.loss == 2 and out.keys() == ["loss", "logits"]
    for change in (out.pop, out.update, out.setdefault, out.clear):
        with pytest.raises(TypeError, match="can be set"):
            change("loss")
    with pytest.raises(KeyError, match="logit"):
        out["logit"] = 1


@pytest.mark.parametrize("pack", [dict, lambda pairs: iter(list(pairs)), list])
def test_an_output_is_made_anew_from_its_items(pack):
    """accelerate and DataParallel make an output from a dict or from pairs."""
    out = ViTMSNClassifierOutput(loss=torch.tensor(1.0), logits=torch.ones(2))
    again = ViTMSNClassifierOutput(pack(out.items()))
    assert again.loss is out.loss and again.logits is out.logits and again.attentions is None


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_outputs_can_be_copied_and_pickled(twin):
    """A copy has the same fields."""
    out = ViTMSNModelOutput(last_hidden_state=torch.ones(2), attentions=(torch.zeros(1),))
    again = twin(out)
    assert isinstance(again, ModelOutput) and again.keys() == out.keys()
    assert again.last_hidden_state.equal(out.last_hidden_state)


def test_compiled_models_return_the_same_outputs():
    """One graph without a break, labels, hidden states and reading by key and position included."""
    model = tiny_classifier(num_hidden_layers=1).eval()

    def probability_and_output(images, labels):
        out = model(images, labels=labels, output_hidden_states=True)
        return out["logits"].softmax(dim=-1) * out[0], out

    compiled = torch.compile(probability_and_output, fullgraph=True, backend="eager")
    for actual, expected in zip(
        compiled(IMAGES, LABELS), probability_and_output(IMAGES, LABELS), strict=True
    ):
        assert type(actual) is type(expected)
        if isinstance(expected, ModelOutput):
            assert actual.keys() == expected.keys()
            actual, expected = actual.to_tuple(), expected.to_tuple()
        assert_close(actual, expected)


@pytest.mark.skipif(not TRACES_DICTS, reason="torch.jit.trace takes dicts")
def test_models_can_be_traced():
    """torch.jit.trace, strict=False, gives the logits of batches of any size."""
    model = tiny_classifier().eval()
    traced = torch.jit.trace(model, (IMAGES,), strict=False)
    images = randn(3, 3, 32, 32)
    assert_close(traced(images)["logits"], model(images).logits)


# -- gradient checkpointing and saving, as Trainer asks for them -----------------------------------


def test_gradient_checkpointing_takes_what_is_passed_and_can_be_switched_off():
    """Any arguments are taken; the loss is the same with it, and off means off."""
    model = tiny_classifier()
    expected = model(IMAGES, labels=LABELS).loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}, x=1)
    assert model.vit.gradient_checkpointing
    assert_close(model(IMAGES, labels=LABELS).loss, expected)
    model.gradient_checkpointing_disable()
    assert not model.vit.gradient_checkpointing


def test_save_pretrained_takes_what_trainer_passes(tmp_path):
    """Weights of a state_dict are written, by another process than the first nothing is."""
    model = tiny_classifier().eval()
    other = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()

    options = {"save_function": torch.save, "max_shard_size": "5GB", "is_main_process": True}
    for safe in (True, False):
        model.save_pretrained(tmp_path, state_dict=other, safe_serialization=safe, **options)
        loaded = ViTMSNForImageClassification.from_pretrained(tmp_path).state_dict()
        for name, value in other.items():
            assert_close(loaded[name], value)
        other = {name: value + 1 for name, value in other.items()}  # the older file is not read


def test_unknown_words_of_save_pretrained_name_the_nearest(tmp_path):
    """A misspelt word is not swallowed."""
    with pytest.raises(TypeError, match="did you mean state_dict="):
        tiny_classifier().save_pretrained(tmp_path, state_dic={})
    with pytest.raises(ValueError, match="upload_folder"):
        tiny_classifier().save_pretrained(tmp_path, push_to_hub=True)


# -- transformers: pipeline and Trainer ------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved classifier."""
    folder = tmp_path_factory.mktemp("model")
    tiny_classifier().save_pretrained(folder)
    return folder


# transformers 5 with its torchvision backend moves pixels by up to 0.02 after normalisation
PIPELINE_LIMIT = {"rtol": 0, "atol": 2e-3}


def test_pipelines_take_our_folders(transformers, folder):
    """The two pipelines for images give our probabilities and hidden states."""
    model = ViTMSNForImageClassification.from_pretrained(folder)
    picture = random_picture()
    with torch.no_grad():
        expected = model(preprocess(picture, model.config)).logits.softmax(dim=-1)[0]
    found = transformers.pipeline("image-classification", model=str(folder), top_k=5)(picture)
    scores = {answer["label"]: answer["score"] for answer in found}
    actual = torch.tensor([scores[name] for name in model.config.id2label.values()])
    assert_close(actual, expected, **PIPELINE_LIMIT)

    features = transformers.pipeline("image-feature-extraction", model=str(folder))(picture)
    assert torch.tensor(features).shape == (1, 17, 24)


def trained_by_trainer(transformers, model, folder: Path, **settings):
    """A Trainer after four steps, and the losses that it logged."""
    pytest.importorskip("accelerate")
    samples = []
    for i in range(8):
        samples.append({"pixel_values": randn(3, 32, 32, seed=i), "labels": i % 5})
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **settings},
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}]
)
def test_trainer_trains_our_class_as_transformers_own(transformers, folder, settings, tmp_path):
    """Step by step, the losses are those of transformers' class with the same weights."""
    losses = []
    for cls in (ViTMSNForImageClassification, transformers.ViTMSNForImageClassification):
        model = cls.from_pretrained(folder).train()
        losses.append(trained_by_trainer(transformers, model, tmp_path, **settings)[1])
    assert len(losses[0]) == 4
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-4)


def test_trainer_predicts_and_what_it_saves_is_read(transformers, folder, tmp_path):
    """Predictions, with labels and without, are the logits; the best checkpoint is loaded."""
    model = ViTMSNForImageClassification.from_pretrained(folder).train()
    trainer, _ = trained_by_trainer(
        transformers,
        model,
        tmp_path,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    samples = [{"pixel_values": image} for image in IMAGES]
    with torch.no_grad():
        expected = trainer.model.eval()(IMAGES).logits.numpy()
    assert abs(trainer.predict(samples).predictions - expected).max() < 1e-5
    labelled = [{**sample, "labels": 0} for sample in samples]
    assert abs(trainer.predict(labelled).predictions - expected).max() < 1e-5

    trainer.save_model(str(tmp_path / "saved"))
    loaded = ViTMSNForImageClassification.from_pretrained(tmp_path / "saved", config=model.config)
    assert abs(loaded(IMAGES).logits.detach().numpy() - expected).max() < 1e-5


# -- what people pass to from_pretrained, configs and models ---------------------------------------


def test_from_pretrained_takes_fields_of_the_config(folder):
    """Labels, dropout, problem type and the size of images; positions are resampled, and said."""
    load = ViTMSNForImageClassification.from_pretrained
    names = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    model = load(folder, id2label=names, hidden_dropout_prob=0.5, problem_type="regression")
    assert model.config.id2label == names and model.config.label2id["e"] == 4
    assert model.vit.blocks[0].dropout1.p == 0.5 and model.config.problem_type == "regression"
    assert load(folder, label2id={"x": 0, "y": 1, "z": 2, "u": 3, "v": 4}).config.id2label[4] == "v"
    with pytest.warns(UserWarning, match="resampled from 32 to 48"):
        model = load(folder, image_size=48)
    assert model(preprocess(random_picture(), model.config)).logits.shape == (1, 5)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", None])
def test_words_of_transformers_are_taken(folder, device_map):
    """A device_map and words that mean nothing here change no weight."""
    model, info = ViTMSNForImageClassification.from_pretrained(
        folder,
        device_map=device_map,
        low_cpu_mem_usage=True,
        use_safetensors=True,
        local_files_only=True,
        return_dict=True,
        output_loading_info=True,
    )
    assert model(IMAGES.to(model.device)).logits.shape == (2, 5)
    assert not any(info.values())


def test_unknown_words_are_refused_with_the_nearest(folder):
    """A misspelt word is never swallowed."""
    with pytest.raises(TypeError, match="did you mean ignore_mismatched_sizes="):
        ViTMSNForImageClassification.from_pretrained(folder, ignore_mismatched_size=True)


def test_words_for_the_hub_are_passed_on(folder, monkeypatch):
    """revision, token, cache_dir and local_files_only reach huggingface_hub."""
    hub = pytest.importorskip("huggingface_hub")
    passed = {}

    def snapshot_download(name, **words):
        passed.update(words)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    words = {"revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": True}
    ViTMSNForImageClassification.from_pretrained("some/model", **words)
    assert words.items() <= passed.items()


def test_configs_do_what_those_of_transformers_do(tmp_path):
    """num_labels moves id2label, unknown keywords are kept, wide values are taken."""
    config = ViTMSNConfig(layer_norm_eps=1.0, initializer_range=1.0, mystery=[1])
    assert config.extra == {"mystery": [1]} and config.model_type == "vit_msn"
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.id2label = {0: "cat"}
    assert config.num_labels == 1
    config.update({"num_labels": 4, "hidden_size": 24, "num_attention_heads": 3, "other": 2})
    assert len(config.label2id) == 4 and config.hidden_size == 24 and config.extra["other"] == 2
    config.save_pretrained(tmp_path)
    assert ViTMSNConfig.from_pretrained(tmp_path) == config
    assert ViTMSNConfig.from_dict(json.loads(config.to_json_string())) == config
    with pytest.warns(UserWarning, match="did you mean hidden_size="):
        ViTMSNConfig(hiden_size=3)


def test_models_answer_what_clients_ask():
    """Device, type, parameters and the parts have transformers' names."""
    model = tiny_classifier(num_labels=4)
    assert model.device.type == "cpu" and model.dtype == torch.float32 and model.num_labels == 4
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    model.vit.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 4 * 24 + 4
    embedding = sum(p.numel() for p in model.vit.patch_embed.parameters())
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == embedding
    assert model.base_model is model.vit and model.vit.base_model is model.vit
    assert model.get_input_embeddings() is model.vit.patch_embed
    assert model.main_input_name == "pixel_values" and model.config_class is ViTMSNConfig


@pytest.mark.parametrize("make", [tiny_classifier, tiny_backbone])
def test_load_state_dict_takes_the_names_of_transformers(make):
    """A state dict of transformers' class is converted; its logits are the model's."""
    source = make().eval()
    model = type(source)(source.config).eval()
    model.load_state_dict(to_transformers(source.state_dict(), channels=3))
    for name, value in source.state_dict().items():
        assert model.state_dict()[name].equal(value)


@pytest.mark.parametrize("with_config", [True, False])
def test_weights_under_timms_names_are_read(with_config, tmp_path):
    """A folder of timm, with or without its config.json, gives the model and its statistics."""
    shape = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 80}
    source = tiny_classifier(**shape).eval()
    state = to_original(source.vit.state_dict(), channels=3)
    for part in ("weight", "bias"):
        state[f"head.{part}"] = source.classifier.state_dict()[part]
    torch.save(state, tmp_path / "pytorch_model.bin")
    if with_config:
        statistics = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
        config = {"architecture": "vit_test", "num_classes": 5, "pretrained_cfg": statistics}
        (tmp_path / "config.json").write_text(json.dumps(config))

    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.warns(UserWarning, match="1 heads, each 64 wide"):
            model = ViTMSNForImageClassification.from_pretrained(place)
        assert_close(model(IMAGES).logits, source(IMAGES).logits)
    if with_config:
        assert model.config.preprocessor["image_std"] == [0.25] * 3
        assert model.config.preprocessor["resample"] == 3


def test_what_trainer_saves_is_read_without_a_config(tmp_path):
    """Our names without config.json: the shapes tell all but the heads."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = tiny_classifier(hidden_size=64, num_attention_heads=1).eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="pass config="):
        model = ViTMSNForImageClassification.from_pretrained(tmp_path)
    assert_close(model(IMAGES).logits, source(IMAGES).logits)


def test_activations_are_those_of_transformers(transformers):
    """Every name of an activation computes what it computes there."""
    x = torch.linspace(-5, 5, 101)
    for name, activation in ACTIVATIONS.items():
        assert_close(activation(x), transformers.activations.ACT2FN[name](x), rtol=0, atol=1e-5)
