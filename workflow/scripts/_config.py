"""Checks of the config that a schema cannot express, and error messages of one line.

Used while the workflow is parsed, before anything is computed or written.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import ValidationError

from metacanary import comparisons, data, families, images, reference_scores

Config = Mapping[str, Any]

METAGRADIENT = "metagradient"
GRADIENT_MAX = "gradient_max"
OPTIMIZED = (METAGRADIENT, GRADIENT_MAX)  # the families that are optimised; all others are in families.FAMILIES

EXPECTED = {
    "type": "{}",
    "enum": "one of {}",
    "const": "{}",
    "minimum": "a number >= {}",
    "maximum": "a number <= {}",
    "exclusiveMinimum": "a number > {}",
    "exclusiveMaximum": "a number < {}",
    "minItems": "at least {} item(s)",
    "minProperties": "at least {} entry",
    "uniqueItems": "no item twice",
    "pattern": "text that matches {}",
}


def either(names: Iterable[str]) -> str:
    """Builds a regular expression that matches the names and nothing else, and nothing at all if there are none."""
    return "|".join(re.escape(name) for name in sorted(names)) or "(?!)"


def one_line(error: Exception) -> str:
    """Says in one line which key is wrong, what it holds, and what it should hold.

    Args:
      error: From `check`, or from `snakemake.utils.validate`, whose context is a jsonschema.ValidationError.
    """
    cause = error.__context__ if isinstance(error.__context__, ValidationError) else error
    if not isinstance(cause, ValidationError):
        return " ".join(str(error).split())
    where = ".".join(key for key in cause.absolute_path if isinstance(key, str)) or "top level"
    if cause.validator == "additionalProperties":
        return f"{where}: {_unknown(cause)}"
    if cause.validator == "required":
        missing = next(key for key in cause.validator_value if key not in cause.instance)
        return f"{where}: expected a key {missing!r}"
    expected = cause.validator_value
    expected = " or ".join(map(str, expected)) if isinstance(expected, list) else expected
    text = EXPECTED.get(str(cause.validator), "{}").format(expected)
    return f"{where}: got {cause.instance!r}, expected {text}{_yaml_hint(cause.instance)}"


def num_canaries(config: Config, kind: str) -> int:
    """The number of canaries of a kind: its own, or that of all kinds."""
    return config["canaries"]["kinds"][kind]["num_canaries"] or config["canaries"]["num_canaries"]


def compared_kinds(config: Config, comparison: str) -> dict[str, dict[str, Any]]:
    """The settings that place the canary kinds of a comparison, as `comparisons.points` takes them."""
    kinds, names = config["canaries"]["kinds"], config["comparisons"][comparison]["canaries"]
    return {
        name: {key: kinds[name][key] for key in ("family", "start", "model") if key in kinds[name]}
        | {"num_canaries": num_canaries(config, name)}
        for name in names
    }


def compared_trainings(config: Config, comparison: str) -> list[str]:
    """The trainings of a comparison: those that it names, or all that are audited with all of its canary kinds."""
    chosen, trainings = config["comparisons"][comparison], config["trainings"]
    able = [name for name, training in trainings.items() if {*chosen["canaries"]} <= {*training["canaries"]}]
    return able if chosen["trainings"] is None else list(chosen["trainings"])


def ledger_kinds(config: Config, training: str) -> list[str]:
    """The canary kinds of a training's ledger: those that are named, or all of as many canaries as `canaries` says."""
    named, audited = config["ledger"]["canaries"], config["trainings"][training]["canaries"]
    equal = [kind for kind in audited if num_canaries(config, kind) == config["canaries"]["num_canaries"]]
    return equal if named is None else list(named)


def figure2_trainings(config: Config) -> list[str]:
    """The trainings of figure 2."""
    chosen = config["figures"]["figure2_training"]
    return [chosen] if isinstance(chosen, str) else list(chosen)


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
    _check_figures(config)
    _check_comparisons(config)
    _check_accuracy(config)
    _check_ledger(config)


def require(condition: bool, where: str, got: Any, expected: str) -> None:
    """Raises the ValueError of a wrong key."""
    if not condition:
        raise ValueError(f"{where}: got {got!r}, expected {expected}")


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
        require(num_canaries(config, kind) <= num_train, *_num_canaries_key(config, kind), expected)
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
            num_train - max((num_canaries(config, kind) for kind in kinds), default=0),
        )
        require(batch_size <= others, f"{where}.batch_size", batch_size, f"at most the {others} images of {name}")


def _num_canaries_key(config: Config, kind: str) -> tuple[str, int]:
    """The key that sets the number of canaries of a kind, and the number."""
    own = config["canaries"]["kinds"][kind]["num_canaries"] is not None
    return f"canaries.kinds.{kind}.num_canaries" if own else "canaries.num_canaries", num_canaries(config, kind)


def _sgd_options(config: Config) -> Iterable[tuple[str, Config, list[str]]]:
    """Lists the options of all trainings without privacy, with where they stand, and the canary kinds they meet."""
    for name, kind in config["canaries"]["kinds"].items():
        if kind["family"] in OPTIMIZED and kind["algorithm"] == "sgd":
            yield f"canaries.kinds.{name}.training", kind["training"], [name]
    for name, training in config["trainings"].items():
        if training["algorithm"] == "sgd":
            known = [kind for kind in training["canaries"] if kind in config["canaries"]["kinds"]]
            yield f"trainings.{name}.options", training["options"], known


def _check_kind(name: str, kind: Config, config: Config) -> None:
    """Checks that families are known, and that canaries can be paired if they are optimised so."""
    where, optimized, known = f"canaries.kinds.{name}", kind["family"] in OPTIMIZED, sorted(families.FAMILIES)
    key = "start" if optimized else "family"
    expected = ", ".join(known if optimized else [*known, *OPTIMIZED])
    require(kind[key] in known, f"{where}.{key}", kind[key], f"one of {expected}")
    if not optimized:
        return
    _check_options(f"{where}.training", kind["algorithm"], kind["training"])
    if kind["algorithm"] == "dpsgd":
        noise = kind["training"]["noise_multiplier"]
        expected = "a number, since no target epsilon sets it"
        require(noise is not None, f"{where}.training.noise_multiplier", noise, expected)
    if kind["family"] == METAGRADIENT:
        _check_game(f"{where}.game", kind["game"], [name], config)
        return
    last, steps = kind["training"]["num_steps"], kind["proxy_steps"]
    expected = f"steps of the training, at most num_steps = {last}"
    require(all(step <= last for step in steps), f"{where}.proxy_steps", steps, expected)


def _check_game(where: str, game: str, kinds: Iterable[str], config: Config) -> None:
    """Checks that canaries can be paired where they are to be."""
    for kind in kinds:
        is_even = num_canaries(config, kind) % 2 == 0
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
    optimized = [name for name, kind in kinds.items() if kind["family"] == METAGRADIENT]
    for name in config["metasmoothness"]["canaries"]:
        expected = f"one of {', '.join(optimized)} (canaries.kinds of family {METAGRADIENT})"
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


def _check_figures(config: Config) -> None:
    """Checks that what figures and tables show is there."""
    figures, scores, trainings = config["figures"], config["audit"]["scores"], config["trainings"]
    for key, known in (
        ("figure1_dataset", config["datasets"]),
        ("figure1_canary", config["canaries"]["kinds"]),
        ("figure2_dataset", config["datasets"]),
        ("figure2_score", scores),
    ):
        require(figures[key] in known, f"figures.{key}", figures[key], f"one of {', '.join(known)}")
    score = config["tables"]["score"]
    require(score in scores, "tables.score", score, f"one of {', '.join(scores)}")
    auditors, auditor = config["audit"]["auditors"], figures["figure2_auditor"]
    require(auditor in auditors, "figures.figure2_auditor", auditor, f"one of audit.auditors: {', '.join(auditors)}")
    missing = [name for name in ("steinke", "fdp_gaussian") if name not in auditors]
    require(not missing, "audit.auditors", auditors, f"also {' and '.join(missing)}, for tables 1 and 2")
    _check_protocols(config)
    for training in figure2_trainings(config):
        require(training in trainings, "figures.figure2_training", training, f"one of {', '.join(trainings)}")
        epsilons, shown = trainings[training]["epsilons"], figures["figure2_epsilon"]
        require(float(shown) in map(float, epsilons), "figures.figure2_epsilon", shown, f"one of {epsilons}")


def _check_comparisons(config: Config) -> None:
    """Checks that what is compared is audited, and that each canary kind has a place of its own."""
    kinds, trainings, auditors = config["canaries"]["kinds"], config["trainings"], config["audit"]["auditors"]
    for name, chosen in config["comparisons"].items():
        where = f"comparisons.{name}"
        require(re.fullmatch(r"[a-z0-9_]+", name) is not None, "comparisons", name, "letters, digits and _ only")
        for kind in chosen["canaries"]:
            require(kind in kinds, f"{where}.canaries", kind, f"one of {', '.join(kinds)} (canaries.kinds)")
        for training in chosen["trainings"] or []:
            require(training in trainings, f"{where}.trainings", training, f"one of {', '.join(trainings)}")
            missing = [kind for kind in chosen["canaries"] if kind not in trainings[training]["canaries"]]
            expected = f"one that is audited with {', '.join(missing)} too (trainings.{training}.canaries)"
            require(not missing, f"{where}.trainings", training, expected)
        expected = "kinds that a training is audited with all of (trainings.*.canaries)"
        require(bool(compared_trainings(config, name)), f"{where}.canaries", chosen["canaries"], expected)
        expected = f"one of audit.auditors: {', '.join(auditors)}"
        require(chosen["auditor"] in auditors, f"{where}.auditor", chosen["auditor"], expected)
        try:
            comparisons.points(compared_kinds(config, name), chosen["by"])
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error


def _check_accuracy(config: Config) -> None:
    """Checks that the trainings whose accuracy is shown are audited with the canary kind."""
    kind, trainings = config["accuracy"]["canary"], config["trainings"]
    for name in config["accuracy"]["trainings"]:
        require(name in trainings, "accuracy.trainings", name, f"one of {', '.join(trainings)}")
        expected = f"one of trainings.{name}.canaries: {', '.join(trainings[name]['canaries'])}"
        require(kind in trainings[name]["canaries"], "accuracy.canary", kind, expected)


def _check_ledger(config: Config) -> None:
    """Checks that the ledger's trainings have what Dirac canaries stand for, and kinds of as many canaries."""
    chosen, trainings, number = config["ledger"], config["trainings"], config["canaries"]["num_canaries"]
    for name in chosen["trainings"]:
        require(name in trainings, "ledger.trainings", name, f"one of {', '.join(trainings)}")
        training = trainings[name]
        able = training["algorithm"] == "dpsgd" and training["game"] == "independent"
        able = able and training["options"]["clipping"]["name"] == "flat"
        expected = "trainings of algorithm dpsgd with clipping flat, in the independent game"
        require(able, "ledger.trainings", name, expected)
        audited = training["canaries"]
        for kind in chosen["canaries"] or []:
            expected = f"one of trainings.{name}.canaries: {', '.join(audited)}"
            require(kind in audited, "ledger.canaries", kind, expected)
            expected = f"kinds of canaries.num_canaries = {number} canaries, since Dirac canaries are as many"
            require(num_canaries(config, kind) == number, "ledger.canaries", kind, expected)
        expected = f"a training with a kind of canaries.num_canaries = {number} canaries"
        require(bool(ledger_kinds(config, name)), "ledger.trainings", name, expected)
        auditors, auditor = config["audit"]["auditors"], chosen["auditor"]
        require(auditor in auditors, "ledger.auditor", auditor, f"one of audit.auditors: {', '.join(auditors)}")


def _check_protocols(config: Config) -> None:
    """Checks that the protocols that are shown are there."""
    protocols = config["audit"]["protocols"]
    without = [name for name, training in config["trainings"].items() if not training["num_surrogate_runs"]]
    for section, key in (("tables", "protocol"), ("figures", "figure2_protocol")):
        shown, where = config[section][key], f"{section}.{key}"
        able = ", ".join(name for name in protocols if not (name == "surrogate" and without))
        require(shown is None or shown in protocols, where, shown, f"null or one of audit.protocols: {able}")
        expected = f"another one, since {', '.join(without)} has no surrogate runs"
        require(shown != "surrogate" or not without, where, shown, expected)
        fallback = "corrected" if without or "surrogate" not in protocols else "surrogate"
        expected = f"one of audit.protocols ({able}), since {fallback} is not among them"
        require(shown is not None or fallback in protocols, where, shown, expected)


def _unknown(error: ValidationError) -> str:
    """Names the unknown key and the known one that is nearest to it."""
    known = {*error.schema.get("properties", {})}
    patterns = error.schema.get("patternProperties", {})
    key = next(k for k in error.instance if k not in known and not any(re.search(p, k) for p in patterns))
    close = difflib.get_close_matches(key, known, n=1)
    if not known:
        return f"got the name {key!r}, expected one that matches {' or '.join(patterns)}"
    return f"unknown key {key!r}, " + (f"did you mean {close[0]!r}?" if close else f"expected {sorted(known)}")


def _yaml_hint(value: Any) -> str:
    """Explains the commonest surprise of YAML: 1e-5 is text, 1.0e-5 a number."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)
    return f" (YAML takes {value} for text: write {float(value):.1e})" if is_number else ""
