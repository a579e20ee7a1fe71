"""The configuration: schema <- default.yaml <- stage, model, data groups <- `key=value` overrides.

In: command-line words. Out: a checked `Config`. Every key is declared here with its unit; an unknown key is an error.
A group file may hold `stage_1:`, `stage_2:` and `stage_rl:` mappings, which count only in that stage (mini trains more
than Vicuna).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

GROUPS = ("stage", "model", "data")  # each a folder of configs/
CONFIG_ROOT = Path(__file__).resolve().parents[2] / "configs"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB in [0, 1]; OpenAI CLIP, as the authors' release uses
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(round(255 * value) for value in CLIP_MEAN)  # uint8 RGB: padding is zero after normalisation


@dataclass
class EncoderConfig:
    """The frozen image encoder: an open_clip vision tower."""

    name: str = "EVA01-g-14"  # open_clip model name; "vistallm-mini" is ours
    weights: str | None = None  # path or open_clip tag; null = random initialisation
    layer: int = -2  # block whose patch tokens are used; -1 = the last
    image_size: int = 224  # side of the square input, pixels


@dataclass
class TokenizerConfig:
    """The instruction-guided image tokenizer (QFormer)."""

    kind: str = "qformer"  # qformer | patches (the ablation without a tokenizer: every patch token, projected)
    weights: str | None = None  # folder of an InstructBLIP checkpoint; null = random initialisation
    text_tokenizer: str | None = None  # BERT tokenizer of the QFormer; null = built from the task table
    queries: int = 32  # tokens per image; fewer than the weights' file holds = its first ones
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    cross_attention_every: int = 2  # layers
    dropout: float = 0.1
    sees_instruction: bool = True  # false = the ablation without guidance
    max_instruction_tokens: int = 128
    norm_eps: float = 1e-5  # of the norm of patch tokens
    class_token: bool = False  # the encoder's class token comes before the patch tokens, as InstructBLIP was trained


@dataclass
class DecoderConfig:
    """The causal language model."""

    weights: str | None = None  # local path or hub name; null = a small Llama from scratch
    hidden_size: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate_size: int = 11008
    tie_embeddings: bool = False
    system_prompt: str = ""
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.05
    attention: str = "sdpa"  # any attn_implementation of transformers


@dataclass
class LinkConfig:
    """Super links (model.links=all): boxes, masks and keypoints from learned queries beside the text answers."""

    queries: int = 4  # K: slots behind a routing token; of a GRD link the most objects
    tables: str = "separate"  # separate | shared: whether each kind of link has its own K query embeddings
    width: int = 256
    layers: int = 4
    heads: int = 8
    blocks: list[int] = field(default_factory=lambda: [9, 19, -2])  # of the encoder whose patch tokens are read
    stem: bool = True  # false = the ablation without the convolutional stem on the pixels
    image_size: int | None = None  # side of the stem's square input, pixels; null = the encoder's
    weight: float = (
        0.25  # of a link's losses against one supervised token; more swamps the language model (docs/links.md)
    )
    share: float = 0.5  # of the samples that both heads can answer, answered by links while training


@dataclass
class VideoConfig:
    """Videos: samples whose images are frames."""

    keyframes: int = 1  # every n-th frame (and the last one) has its regions as text; vertices between are interpolated


@dataclass
class ModelConfig:
    """The three parts, and super links beside them."""

    name: str = "mini"
    links: str = "none"  # none (VistaLLM as published) | all
    # none | index (frames are told apart by their number in the text alone) | embedding (their image tokens know it,
    # too) | attention (besides, the tokens of a query attend to each other over the frames)
    video: str = "none"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class DataConfig:
    """Shards, mixture and loading."""

    name: str = "mini"
    root: str | None = None  # shard folder, or folder of source folders; local, http(s)://, s3:// or pipe:COMMAND {}
    sources: dict[str, float] = field(default_factory=dict)  # source folder -> how often its samples are met per epoch
    missing_sources: str = "stop"  # stop | skip
    fraction: float = 1.0  # of each source's samples of a task, the first ones; the rest is never met
    temperature: float = 1.0  # T: a source's share s of an epoch becomes s^(1/T); 1 = as weighted
    max_per_task: dict[str, int] = field(default_factory=dict)  # task -> most samples per epoch, over all sources
    templates: int | str | None = None  # drawn for a task: the first n, mini (those of the mini world), null = all
    batch_size: int = 8  # samples per device and step
    workers: int = 2
    lanes: int | None = None  # parts of the data order; null = ranks x workers of the run's start
    shuffle_buffer: int = 1000  # undecoded samples; more where samples share images, by their number per image (<= 16)
    mix_shards: int = 16  # shards that one lane reads side by side
    pool_batches: int = 8  # batches filled together, by length
    max_length: int = 1024  # tokens of one sequence; longer ones are counted rejects
    frames: int = 8  # of a video that are read, evenly spread; while training one is drawn within each equal part
    max_pixels: int = 50_000_000  # of one image; larger ones are counted rejects, never decoded
    cache: str | None = None  # folder that keeps copies of remote shards; null = copied to a temporary file while read
    max_reject_share: float = 0.01  # of the samples read; above it the run stops
    weights: dict[str, float] = field(default_factory=dict)  # task -> how often met per epoch; absent = 0
    val_batches: int = 20  # batches of one validation pass


@dataclass
class TrainConfig:
    """Trainable parts, optimiser and schedule."""

    encoder: bool = False
    tokenizer: bool = True
    decoder: str = "full"  # full | lora | frozen
    links: bool = True  # the link decoder and the region encoder, where model.links is on
    lr: float = 2e-5
    encoder_lr: float | None = None  # null = lr
    tokenizer_lr: float | None = None  # of the QFormer and its queries, without the projection; null = lr
    links_lr: float | None = None  # of the link decoder and the region encoder; null = lr
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: float = 0.03  # share of the steps
    final_lr: float = 0.0  # share of lr at the end of the cosine
    gradient_clip: float = 1.0  # global norm
    loss_weight: str = "token"  # token | sample | sqrt: what counts the same in a step's loss (train/module.py)
    bin_sigma: float = 0.0  # bins; > 0 spreads a coordinate's target over its neighbours (Gaussian); 0 = cross-entropy
    activation_checkpointing: bool = False
    cpu_offload: bool = False  # strategy=fsdp: weights, gradients and optimizer state wait in host memory
    compile: str | None = None  # backend of torch.compile for the repeated layers (inductor); null = not compiled
    frozen_bf16: bool = False  # under precision=bf16, weights that do not train are kept in bfloat16


@dataclass
class ReinforceConfig:
    """stage=rl: answers are sampled, scored and made more or less probable (docs/reinforcement.md)."""

    tasks: list[str] = field(default_factory=lambda: ["res", "gres", "rec", "grec", "coseg", "attcoseg"])  # sampled
    loss: str = "coordinate"  # coordinate | grpo | dr_grpo | gspo
    copies: int = 2  # G: answers sampled for one prompt
    temperature: float = 0.5  # of sampling, and of the probabilities that the loss sees
    moves: list[int] = field(default_factory=lambda: [1, 2, 4])  # bins by which `coordinate` moves each coordinate
    power: float = 1.0  # of an object's IoU in the reward; 2 = squared
    boundary: float = 0.0  # share of the boundary's IoU in an object's reward, in [0, 1]
    clip: float = 0.2  # of the ratio to the sampler's probabilities in grpo, dr_grpo and gspo
    kl: float = 0.0  # weight of the divergence from the model of ckpt=, per token; > 0 keeps a copy of it
    replay: float = 1.0  # gradient of the other tasks' supervised loss against the reward's, at the LM head; 0 = none
    shuffle: bool = False  # the control: rewards of a step in random order, which must not gain


@dataclass
class CheckpointConfig:
    """When checkpoints are written."""

    every_n_steps: int = 1000
    keep: int = 2
    best: str | None = None  # score of val.benchmarks (val/res_ciou) or val_loss: its best stays as best.ckpt
    sharded: bool = False  # strategy=fsdp: a folder to which each process writes its part; false = one file


@dataclass
class ValConfig:
    """Answers that are generated and scored at each validation pass (trainer.val_check_interval=MICRO-BATCHES)."""

    benchmarks: list[str] = field(default_factory=list)  # of benchmarks.yaml; empty = loss and accuracy alone
    samples: int = 300  # of all of them together, the first ones of their val splits


@dataclass
class DecodeConfig:
    """Generation at evaluation: greedy."""

    max_new_tokens: int | None = None  # tokens of an answer; null = as many as the form of the task's answers needs
    batch_size: int = 16
    grammar: bool = True  # only tokens that keep regions readable; false = free decoding
    limit: int | None = None  # samples per benchmark; null = all
    template: int = 0  # number of the instruction template; 0 = the fixed one that scores are published with
    teacher_forced: bool = False  # links are read behind the true answer's text (answer=link); false = free-running


@dataclass
class ForeignConfig:
    """How another system's answers write coordinates (format=text) and absence; declared, never found out."""

    coordinates: str | None = None  # unit (0..1) | thousand (0..1000) | pixels (of the record's width, height, if any)
    order: str = "xyxy"  # of a box: xyxy | yxyx | xywh
    padded: bool = False  # coordinates are of the image padded to a centred square, as LLaVA's and Shikra's are
    none: str = r"\[\s*\]"  # regular expression: an answer that holds it, and no region, says "no target"


@dataclass
class LogConfig:
    """Loggers beside metrics.csv."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "vistallm"
    every_n_seconds: float = 30.0  # between printed lines


@dataclass
class Config:
    """One run."""

    stage: int | str = 1  # 1 | 2 | rl
    name: str | None = None  # null = stage<k>-<model>
    run_dir: str | None = None  # null = runs/<name>
    ckpt: str | None = None  # run folder or file whose weights the run starts from
    resume: str = "auto"  # auto | never | path of a checkpoint
    seed: int = 0
    strategy: str = "auto"  # auto | single | ddp | fsdp
    precision: str = "auto"  # auto | fp32 | bf16
    dry_run: bool = False
    coords: str = "tokens"  # tokens | text
    num_bins: int = 1001
    points: int = 32  # budget of one mask object
    answer: str = "both"  # text | link | both: the heads that evaluation asks
    mask_sampler: str = "adaptive"  # uniform | curvature | adaptive
    target_iou: float | None = None  # fewest points that reach it; null = always the whole budget
    benchmarks: list[str] | None = None  # null = all of data.root's
    predictions: str | None = None  # score this file (format=masks: folder) instead of generating
    format: str = "vistallm"  # of `predictions`: vistallm | coco | masks | text (docs/evaluation.md)
    foreign: ForeignConfig = field(default_factory=ForeignConfig)
    compare: dict[str, str] = field(default_factory=dict)  # label -> scores.json whose scores the report shows beside
    model: ModelConfig = field(default_factory=ModelConfig)
    links: LinkConfig = field(default_factory=LinkConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    val: ValConfig = field(default_factory=ValConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # Lightning Trainer arguments


OPEN_KEYS = ("trainer", "compare", "data.weights", "data.sources", "data.max_per_task")  # mappings of any keys
CHOICES = {
    "stage": (1, 2, "rl"),
    "reinforce.loss": ("coordinate", "grpo", "dr_grpo", "gspo"),
    "strategy": ("auto", "single", "ddp", "fsdp"),
    "precision": ("auto", "fp32", "bf16"),
    "coords": ("tokens", "text"),
    "answer": ("text", "link", "both"),
    "format": ("vistallm", "coco", "masks", "text"),
    "foreign.coordinates": (None, "unit", "thousand", "pixels"),
    "foreign.order": ("xyxy", "yxyx", "xywh"),
    "model.links": ("none", "all"),
    "model.video": ("none", "index", "embedding", "attention"),
    "links.tables": ("separate", "shared"),
    "model.tokenizer.kind": ("qformer", "patches"),
    "mask_sampler": ("uniform", "curvature", "adaptive"),
    "data.missing_sources": ("stop", "skip"),
    "train.loss_weight": ("token", "sample", "sqrt"),
    "train.decoder": ("full", "lora", "frozen"),
}
LEAST = {  # the smallest value -> numbers that must not be below it
    0: "data.workers data.max_reject_share train.lr train.encoder_lr train.tokenizer_lr train.links_lr "
    "train.weight_decay train.warmup train.gradient_clip train.bin_sigma links.weight links.share log.every_n_seconds "
    "reinforce.power reinforce.boundary reinforce.clip reinforce.kl reinforce.replay",
    1: "model.encoder.image_size model.tokenizer.queries model.decoder.lora_rank data.batch_size data.shuffle_buffer "
    "data.mix_shards data.pool_batches data.max_length checkpoint.every_n_steps checkpoint.keep val.samples "
    "decode.max_new_tokens decode.batch_size data.frames video.keyframes links.queries links.layers links.heads "
    "reinforce.copies",
    2: "num_bins",
    3: "points",
}


def load_config(argv: list[str]) -> Config:
    """Build the configuration from `key=value` words such as `["stage=2", "model=mini", "train.lr=1e-4"]`.

    A ValueError says all problems at once, one per line, and names the nearest known key of an unknown one.
    """
    overrides, problems = _split_words(argv), list[str]()
    default = cast(DictConfig, OmegaConf.load(CONFIG_ROOT / "default.yaml"))
    names = {group: overrides.pop(group, "") or str(default[group]) for group in GROUPS}
    stage, merged = names["stage"], OmegaConf.masked_copy(default, [str(k) for k in default if k not in GROUPS])
    merged.stage = int(stage) if stage.isdigit() else stage
    for group, name in names.items():
        path = CONFIG_ROOT / group / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            problems.append(f"{group}={name}: no such {group}; choose one of {known}")
            continue
        layer = cast(DictConfig, OmegaConf.load(path))
        plain = OmegaConf.masked_copy(layer, [str(key) for key in layer if not str(key).startswith("stage_")])
        merged = cast(DictConfig, OmegaConf.merge(merged, plain, layer.get(f"stage_{stage}") or {}))
    return _checked(OmegaConf.structured(Config), merged, problems + _override(merged, overrides))


def config_from_file(path: Path) -> Config:
    """Read the resolved `config.yaml` of a run folder; raises ValueError as `load_config` does."""
    if not path.is_file():
        raise ValueError(f"{path}: expected the config.yaml of a run folder, found no such file")
    return _checked(
        OmegaConf.structured(Config), OmegaConf.load(path), [], f"{path}, of another version? Change there: "
    )


def apply_overrides(config: Config, argv: list[str]) -> Config:
    """Return `config` with `key=value` words on top."""
    merged: Any = DictConfig(OmegaConf.to_container(OmegaConf.structured(config)))
    return _checked(OmegaConf.structured(Config), merged, _override(merged, _split_words(argv)))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _split_words(argv: list[str]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.+-]*", key):
            raise ValueError(f"{word!r}: expected key=value (no dashes), for example stage=1 or train.lr=1e-4")
        overrides[key] = value
    return overrides


def _override(merged: Any, words: dict[str, str]) -> list[str]:
    """Write each word into `merged`; returns the problems, one per word that is not a readable value of its key."""
    problems = []
    for key, value in words.items():
        try:
            read = OmegaConf.create(f"v: {value}").v if value else None  # data.weights={rec: 1} leaves no other task
            OmegaConf.update(merged, key, read, merge=key not in OPEN_KEYS)
        except (OmegaConfBaseException, YAMLError) as error:
            problems.append(f"{key}={value}: {' '.join(str(error).split())}; quote special characters as YAML does")
    return problems


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        name, value = f"{prefix}{key}", cast(Any, node._get_node(key))
        nested = isinstance(value, DictConfig) and name not in OPEN_KEYS and not value._is_none()
        yield from _leaves(value, f"{name}.") if nested else [name]


def _checked(schema: DictConfig, merged: Any, problems: list[str], source: str = "") -> Config:
    known = set(_leaves(schema))
    for key in _leaves(merged):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            problems.append(f"unknown key {key!r}; the nearest known one is {near[0]!r}")
            continue
        try:
            OmegaConf.update(schema, key, OmegaConf.select(merged, key), merge=False)
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
    for key, allowed in CHOICES.items():
        if (value := OmegaConf.select(schema, key)) not in allowed:
            problems.append(f"{key}={value}: expected one of {', '.join(map(str, allowed))}")
    for least, keys in LEAST.items():
        for key in keys.split():
            if (value := OmegaConf.select(schema, key)) is not None and not value >= least:
                problems.append(f"{key}={value}: expected at least {least}")
    if problems:
        raise ValueError(source + "\n".join(problems))
    config = cast(Config, OmegaConf.to_object(schema))
    config.name = config.name or f"stage{config.stage}-{config.model.name}"
    config.run_dir = config.run_dir or f"runs/{config.name}"
    return config
