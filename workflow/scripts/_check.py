"""Checks of a config that a schema cannot express, made while the workflow is parsed: before anything is computed."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import _check_shown
import _config
from _config_error import require

from metacanary import data, families, images, reference_scores

Config = Mapping[str, Any]


def check(config: Config) -> None:
    """Checks what keys say of each other.

    Args:
      config: A config that fits the schema, defaults filled in.

    Raises:
      ValueError: For the first key that contradicts another or the data sets, as one line.
    """
    _check_paths(config)
    for dataset in config["datasets"]:
        _check_dataset(config, dataset)
    for name, kind in config["canaries"]["kinds"].items():
        _check_kind(name, kind, config)
    for name, pretraining in config["pretrainings"].items():
        _check_pretraining(f"pretrainings.{name}", pretraining, config)
    for name, training in config["trainings"].items():
        _check_training(f"trainings.{name}", training, config)
        _check_accountant(f"trainings.{name}", training, config)
    _check_scores(config)
    _check_metasmoothness(config)
    _check_tan(config)
    _check_shown.check(config)


def _check_paths(config: Config) -> None:
    """Checks that no folder leads out of where it is, or means something to a shell, and no name has a line's end.

    The schema's patterns do not see a line's end behind a name.
    """
    for key in ("results_dir", "data_dir"):
        text = config[key]
        plain = re.fullmatch(r"[\w./@%+=:,~ -]+", text) and "\n" not in text and ".." not in text.split("/")
        expected = "a folder of letters, digits, spaces and ./@%+=:,~_- without a part '..'"
        require(bool(plain) and not text.startswith("-"), key, text, expected)
    names = {"canaries.kinds": config["canaries"]["kinds"], "trainings": config["trainings"]}
    for where, found in {"experiment": [config["experiment"]], **names}.items():
        for name in found:
            require(re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None, where, name, "letters, digits, _ and - only")


def _check_dataset(config: Config, name: str) -> None:
    """Checks sizes against a data set."""
    require(name in data.names(), "datasets", name, f"one of {', '.join(data.names())}")
    source, size = data.SOURCES[name], config["image_size"]
    subset, num_classes = config["num_train"], len(source.class_names)
    fits = subset is None or num_classes <= subset < source.num_train
    expected = f"null, or from {num_classes} to {source.num_train - 1} of the {source.num_train} images of {name}"
    require(fits, "num_train", subset, expected)
    num_train = subset or source.num_train
    for kind in config["canaries"]["kinds"]:
        expected = f"at most the {num_train} training images of {name}"
        require(_config.num_canaries(config, kind) <= num_train, *_num_canaries_key(config, kind), expected)
    stored = source.image_shape[:2]
    expected = f"null, at least the {max(stored)} pixels stored in {name}, or a divisor of them"
    require(size is None or images.can_resize(stored, size), "image_size", size, expected)
    channels, own = config["channels"], source.image_shape[2]
    expected = f"null or the {own} channels of {name}" if own > 1 else "null, 1 or 3"
    require(channels in ((None, own) if own > 1 else (None, 1, 3)), "channels", channels, expected)
    shift, num_population = config["audit"]["score_augmentation"]["shift"], config["audit"]["num_population"]
    most = size or min(source.image_shape[:2])
    require(shift <= most, "audit.score_augmentation.shift", shift, f"at most the {most} pixels of {name}")
    expected = f"at most the {source.num_test} test images of {name}"
    require(num_population <= source.num_test, "audit.num_population", num_population, expected)
    for where, options, kinds in _sgd_options(config):
        batch_size, others = (
            options["batch_size"],
            num_train - max((_config.num_canaries(config, kind) for kind in kinds), default=0),
        )
        require(batch_size <= others, f"{where}.batch_size", batch_size, f"at most the {others} images of {name}")


def _num_canaries_key(config: Config, kind: str) -> tuple[str, int]:
    """The key that sets the number of canaries of a kind, and the number."""
    own = config["canaries"]["kinds"][kind]["num_canaries"] is not None
    return f"canaries.kinds.{kind}.num_canaries" if own else "canaries.num_canaries", _config.num_canaries(config, kind)


def _sgd_options(config: Config) -> Iterable[tuple[str, Config, list[str]]]:
    """Lists the options of all trainings without privacy, with where they stand, and the canary kinds they meet."""
    for name, kind in config["canaries"]["kinds"].items():
        if kind["family"] in _config.OPTIMIZED and kind["algorithm"] == "sgd":
            yield f"canaries.kinds.{name}.training", kind["training"], [name]
    for name, training in config["trainings"].items():
        if training["algorithm"] == "sgd":
            known = [kind for kind in training["canaries"] if kind in config["canaries"]["kinds"]]
            yield f"trainings.{name}.options", training["options"], known


def _check_kind(name: str, kind: Config, config: Config) -> None:
    """Checks that families are known, and that canaries can be paired if they are optimised so."""
    where, optimized, known = f"canaries.kinds.{name}", kind["family"] in _config.OPTIMIZED, sorted(families.FAMILIES)
    key = "start" if optimized else "family"
    expected = ", ".join(known if optimized else [*known, *_config.OPTIMIZED])
    require(kind[key] in known, f"{where}.{key}", kind[key], f"one of {expected}")
    if not optimized:
        return
    _check_options(f"{where}.training", kind["algorithm"], kind["training"])
    if kind["algorithm"] == "dpsgd":
        noise = kind["training"]["noise_multiplier"]
        expected = "a number, since no target epsilon sets it"
        require(noise is not None, f"{where}.training.noise_multiplier", noise, expected)
    if kind["family"] == _config.METAGRADIENT:
        _check_game(f"{where}.game", kind["game"], [name], config)
        _check_labels(f"{where}.labels", kind["labels"], kind["num_metasteps"])
        last, steps = kind["training"]["num_steps"], kind["objective_steps"]
        is_valid = steps == sorted(steps) and all(step <= last for step in steps)
        require(is_valid, f"{where}.objective_steps", steps, f"ascending steps, at most num_steps = {last}")
        return
    last, steps = kind["training"]["num_steps"], kind["proxy_steps"]
    expected = f"steps of the training, at most num_steps = {last}"
    require(all(step <= last for step in steps), f"{where}.proxy_steps", steps, expected)


def _check_labels(where: str, labels: Config | None, num_metasteps: int) -> None:
    """Checks that labels are classes in the end."""
    if labels is not None:
        after, expected = labels["harden_after"], f"at most num_metasteps = {num_metasteps}"
        require(after <= num_metasteps, f"{where}.harden_after", after, expected)


def _check_game(where: str, game: str, kinds: Iterable[str], config: Config) -> None:
    """Checks that canaries can be paired where they are to be."""
    for kind in kinds:
        is_even = _config.num_canaries(config, kind) % 2 == 0
        expected = f"an even number, since {where} is paired"
        require(game != "paired" or is_even, *_num_canaries_key(config, kind), expected)


def _check_pretraining(where: str, pretraining: Config, config: Config) -> None:
    """Checks that images are public, enough, and of the shape of those that are audited."""
    name, subset, size = pretraining["dataset"], pretraining["num_train"], config["image_size"]
    require(name in data.names(), f"{where}.dataset", name, f"one of {', '.join(data.names())}")
    source, num_images, audited = data.SOURCES[name], data.SOURCES[name].num_train, config["datasets"]
    if data.origin(name) in map(data.origin, audited):
        expected = (
            f"another data set than {', '.join(audited)}, whose images are private, or a num_train that leaves some"
        )
        require(config["num_train"] is not None, f"{where}.dataset", name, expected)
        num_images -= config["num_train"]
    num_classes = len(source.class_names)
    fits = subset is None or num_classes <= subset <= num_images
    expected = f"null, or from {num_classes} to the {num_images} images of {name} that are not audited"
    require(fits, f"{where}.num_train", subset, expected)
    num_used, batch_size = subset or num_images, pretraining["options"]["batch_size"]
    require(
        batch_size <= num_used, f"{where}.options.batch_size", batch_size, f"at most the {num_used} images of {name}"
    )
    _check_options(f"{where}.options", "sgd", pretraining["options"])
    stored = source.image_shape[:2]
    expected = f"another data set, or an image_size that the {stored[0]}x{stored[1]} pixels of {name} can be brought to"
    require(size is None or images.can_resize(stored, size), f"{where}.dataset", name, expected)
    for other in audited:
        wanted = _image_shape(other, config)
        expected = f"one with images of {'x'.join(map(str, wanted))} (height, width, channels) as those of {other}"
        require(_image_shape(name, config) == wanted, f"{where}.dataset", name, expected)


def _image_shape(name: str, config: Config) -> tuple[int, int, int]:
    """Height, width and channels of a data set's images as they are trained on."""
    height, width, channels = data.SOURCES[name].image_shape
    if channels == 1 and config["channels"]:
        channels = config["channels"]
    size = config["image_size"]
    return (height, width, channels) if size is None else (size, size, channels)


def _check_start(where: str, training: Config, config: Config) -> None:
    """Checks that what a training starts from is known and of its own model."""
    name, known = training["pretraining"], config["pretrainings"]
    if name is not None:
        expected = (
            f"null or one of {', '.join(known)} (pretrainings)" if known else "null, since there are no pretrainings"
        )
        require(name in known, f"{where}.pretraining", name, expected)
        expected = f"the model of pretrainings.{name}, {known[name]['model']}"
        require(training["model"] == known[name]["model"], f"{where}.model", training["model"], expected)


def _check_training(where: str, training: Config, config: Config) -> None:
    """Checks a training recipe."""
    kinds = config["canaries"]["kinds"]
    for kind in training["canaries"]:
        require(kind in kinds, f"{where}.canaries", kind, f"one of {', '.join(kinds)} (canaries.kinds)")
    for epsilon in map(float, training["epsilons"]):
        private = training["algorithm"] == "dpsgd"
        expected = "a finite number for dpsgd" if private else "inf for sgd, which is not private"
        require(math.isfinite(epsilon) == private, f"{where}.epsilons", epsilon, expected)
    together, block = training["runs_together"], training["block_size"]
    expected = f"at most block_size = {block}, the models that a job trains"
    require(together <= block, f"{where}.runs_together", together, expected)
    steps, last = training["snapshots"], training["options"]["num_steps"]
    require(
        steps == sorted(steps) and steps[-1] == last,
        f"{where}.snapshots",
        steps,
        f"ascending steps of which the last is num_steps = {last}",
    )
    _check_game(f"{where}.game", training["game"], training["canaries"], config)
    _check_start(where, training, config)
    _check_options(f"{where}.options", training["algorithm"], training["options"])
    noise = training["options"].get("noise_multiplier")
    require(noise is None, f"{where}.options.noise_multiplier", noise, "null, since the noise follows from epsilons")


def _check_options(where: str, algorithm: str, options: Config) -> None:
    """Checks that microbatches fill the batch of SGD, and that copies of an image can differ."""
    if algorithm == "sgd":
        size, microbatch = options["batch_size"], options["microbatch"]
        expected = f"null or a divisor of batch_size = {size}"
        require(microbatch is None or size % microbatch == 0, f"{where}.microbatch", microbatch, expected)
        return
    _check_copies(f"{where}.augmentation.multiplicity", options["augmentation"])


def _check_copies(where: str, augmentation: Config) -> None:
    """Checks that copies of an image can differ."""
    copies, differ = augmentation["multiplicity"], augmentation["flip"] or augmentation["crop_padding"] > 0
    expected = "1 without flip and crop_padding, since all copies would be equal"
    require(copies == 1 or differ, where, copies, expected)


def _check_accountant(where: str, training: Config, config: Config) -> None:
    """Checks that the accountant knows the neighbours of the game: RDP does not know those of the paired one."""
    paired, accountant = (
        training["algorithm"] == "dpsgd" and training["game"] == "paired",
        config["audit"]["accountant"],
    )
    expected = f"pld, since {where} is dpsgd in the paired game"
    require(not paired or accountant == "pld", "audit.accountant", accountant, expected)


def _check_scores(config: Config) -> None:
    """Checks that all trainings have the reference runs that scores need."""
    for score in config["audit"]["scores"]:
        least = reference_scores.MIN_REFERENCES.get(score, 0)
        for name, training in config["trainings"].items():
            found, expected = training["num_reference_runs"], f"at least {least}, since audit.scores has {score}"
            require(found >= least, f"trainings.{name}.num_reference_runs", found, expected)


def _check_metasmoothness(config: Config) -> None:
    """Checks that variants are optimised, and long enough for what is averaged at both ends."""
    kinds, num_averaged = config["canaries"]["kinds"], config["metasmoothness"]["num_averaged"]
    optimized = [name for name, kind in kinds.items() if kind["family"] == _config.METAGRADIENT]
    for name in config["metasmoothness"]["canaries"]:
        expected = f"one of {', '.join(optimized)} (canaries.kinds of family {_config.METAGRADIENT})"
        require(name in optimized, "metasmoothness.canaries", name, expected)
        most = kinds[name]["num_metasteps"] // 2
        expected = f"at most {most}, half of the num_metasteps of {name}"
        require(num_averaged <= most, "metasmoothness.num_averaged", num_averaged, expected)


def _check_tan(config: Config) -> None:
    """Checks that the reference of a search is a training of DP-SGD from scratch, and that its images suffice."""
    chosen, trainings = config["tan"], config["trainings"]
    if chosen["training"] is None:
        return
    private = [name for name, training in trainings.items() if training["algorithm"] == "dpsgd"]
    expected = f"null or one of the trainings of algorithm dpsgd: {', '.join(private) or 'there is none'}"
    require(chosen["training"] in private, "tan.training", chosen["training"], expected)
    reference = trainings[chosen["training"]]
    pretraining = reference["pretraining"]
    expected = "a training without a pretraining, since all runs of the search start anew"
    require(pretraining is None, "tan.training", chosen["training"], expected)
    for copies in chosen["multiplicities"] or []:
        _check_copies("tan.multiplicities", {**reference["options"]["augmentation"], "multiplicity": copies})
    for dataset in config["datasets"]:
        _check_tan_sizes(config, dataset)


def _check_tan_sizes(config: Config, dataset: str) -> None:
    """Checks the batches and the validation images of a search against a data set."""
    chosen, source = config["tan"], data.SOURCES[dataset]
    num_train, num_classes = config["num_train"] or source.num_train, len(source.class_names)
    held_out, most = chosen["num_validation"], num_train // 2
    expected = f"from {num_classes} to {most}, half of the training images of {dataset}"
    require(num_classes <= held_out <= most, "tan.num_validation", held_out, expected)
    full = config["trainings"][chosen["training"]]["options"]["sampling_prob"] * num_train
    rest = num_train - held_out
    require(
        chosen["batch_size"] < min(full, rest + 1),
        "tan.batch_size",
        chosen["batch_size"],
        f"less than the full batch, {full:g} on {dataset}, and at most the {rest} images that the search trains on",
    )
    for size in chosen["batch_sizes"] or []:
        require(size <= num_train, "tan.batch_sizes", size, f"at most the {num_train} training images of {dataset}")
