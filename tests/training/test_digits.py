"""The digits model: a tiny run from nothing to a pipeline, and the bundled model against what it claims."""

import dataclasses
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the digits model is a diffusers pipeline")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from harmonica_training.digits import (
    DigitsConfig,
    EvaluationConfig,
    classify,
    frechet_distance,
    load_classifier,
    load_pipeline,
    load_split,
    penultimate_features,
    train_and_save,
)
from harmonica_training.digits.autoencoder import build_autoencoder, decode, encode, normalise_latents
from harmonica_training.digits.config import NULL_CLASS, NUM_CLASSES
from harmonica_training.digits.evaluate import generate, requested_labels

BUNDLED = Path(__file__).resolve().parents[2] / "harmonica_rt" / "demo" / "digits-dit"


@pytest.fixture(autouse=True)
def one_thread_and_quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Operators this small gain nothing from threads, and lose much to them on a busy machine."""
    caplog.set_level(logging.ERROR)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundled_record() -> dict:
    return json.loads((BUNDLED / "PROVENANCE.json").read_text())


def test_quick_run_writes_a_pipeline_that_generates(tmp_path: Path) -> None:
    config, measured = DigitsConfig.quick(), EvaluationConfig(images=20, steps=2, batch=20)
    out, work = tmp_path / "model", tmp_path / "work"
    result = train_and_save(config, measured, out, work, command="test")
    assert 0.0 <= result.generated_accuracy <= 1.0

    pipe = load_pipeline(out)
    assert pipe.transformer.dtype == torch.float32
    assert pipe.get_label_ids(["7"]) == [7]
    image = pipe(class_labels=[7], num_inference_steps=2).images[0]
    assert image.size == (config.image_size, config.image_size)

    again = train_and_save(config, measured, out, work, command="test")  # every stage comes from `work`
    assert again == result
    with pytest.raises(ValueError, match="seed"):
        train_and_save(dataclasses.replace(config, seed=1), measured, out, work, command="test")


def test_split_is_repeatable_and_disjoint_in_size() -> None:
    first, second = load_split(16), load_split(16)
    assert torch.equal(first.test_images, second.test_images)
    assert len(first.train_labels) == 1400
    assert len(first.test_labels) == 397
    assert first.train_images.min() >= 0.0
    assert first.train_images.max() <= 1.0


def test_normalised_latents_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(16).eval()
    images = torch.rand(24, 1, 16, 16)
    before = decode(model, encode(model, images))
    normalise_latents(model, images)
    latents = encode(model, images)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(decode(model, latents), before, atol=1e-4, rtol=0.0)


def test_frechet_distance_of_known_gaussians() -> None:
    features = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features, features + 2.0) == pytest.approx(20.0)  # 5 dimensions, each shifted by 2
    # a deviation three times as large: tr(C + 9 C - 6 C) = 4 tr(C), about the mean
    centred = features - features.mean(dim=0)
    assert frechet_distance(centred, 3.0 * centred) == pytest.approx(4.0 * float(centred.T.cov().trace()))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        frechet_distance(features, features[:, :3])


def test_config_rejects_what_it_cannot_train() -> None:
    with pytest.raises(ValueError, match="image_size"):
        DigitsConfig(image_size=60)
    with pytest.raises(ValueError, match="images"):
        EvaluationConfig(images=0)


@pytest.mark.exhaustive  # tests/test_imports.py tries the package without this model of it
def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import harmonica_training.digits"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_bundled_model_draws_the_digits_asked_for(bundled_record: dict) -> None:
    measured = bundled_record["evaluation"]
    config = EvaluationConfig(
        images=20, steps=measured["steps"], guidance_scale=measured["guidance_scale"], seed=7, batch=20
    )
    images = generate(load_pipeline(BUNDLED), config)
    classifier = load_classifier(BUNDLED / "classifier")
    recognised = (classify(classifier, images) == requested_labels(20)).float().mean()
    assert recognised >= 0.9
    assert penultimate_features(classifier, images).shape == (20, classifier.config["features"])


def test_bundled_classifier_is_as_good_as_recorded(bundled_record: dict) -> None:
    data = load_split(bundled_record["config"]["image_size"])
    classifier = load_classifier(BUNDLED / "classifier")
    measured = (classify(classifier, data.test_images) == data.test_labels).float().mean().item()
    assert math.isclose(measured, bundled_record["evaluation"]["classifier_accuracy"], abs_tol=0.006)
    assert measured >= 0.95


def test_bundled_directory_is_small_and_its_provenance_complete(bundled_record: dict) -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert bundled_record["evaluation"]["images"] == 1000
    assert bundled_record["evaluation"]["generated_accuracy"] >= 0.9
    assert bundled_record["evaluation"]["classifier_accuracy"] >= 0.95
    training = bundled_record["training"]["denoiser"]
    assert training["steps"] == bundled_record["config"]["denoiser_steps"]
    assert training["final_loss"] < training["first_loss"]
    for text in (*BUNDLED.rglob("*.json"), *BUNDLED.rglob("*.md")):
        assert not any(root in text.read_text() for root in ("/tmp", "/work", "/root", "/home"))


def test_bundled_class_tables_hold_nothing_that_is_never_used() -> None:
    for block in load_pipeline(BUNDLED).transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        assert table[NUM_CLASSES:NULL_CLASS].count_nonzero() == 0
        assert (table[:NUM_CLASSES].abs().sum(dim=1) > 0).all()
        assert table[NULL_CLASS].abs().sum() > 0
