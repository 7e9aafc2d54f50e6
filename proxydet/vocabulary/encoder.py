"""Text encoders: from class names to embeddings.

Dimensions: C classes, T texts, L tokens, D embedding.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import CheckpointError, VocabularyError
from proxydet.files import remembered_sha256
from proxydet.paths import cache_folder, models_folder
from proxydet.reporting import SILENT
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.weight_files import read_state_dict

if TYPE_CHECKING:
    import torch

    from proxydet.reporting import Progress
    from proxydet.vocabulary.vocabulary import TextEncoder


Floats = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
"""
_VARIABLES = 500


class EmbeddingCache:
    """A file of embeddings, each under the digest of the encoder's weights and the encoded text.

    Several processes may use the file at once. A damaged file is renamed and started again: all that it held can be
    computed again.

    Args:
        path: The file; its folder is made when first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, encoder_digest: str, texts: Iterable[str]) -> dict[str, Floats]:
        """Find embeddings (D,) by text; texts that are not there are left out."""
        by_key = {_key(encoder_digest, text): text for text in texts}
        found: dict[str, Floats] = {}
        with self._opened() as database:
            keys = list(by_key)
            for start in range(0, len(keys), _VARIABLES):
                chunk = keys[start : start + _VARIABLES]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT key, row FROM embeddings WHERE key IN ({marks})"  # noqa: S608 only question marks
                for key, row in database.execute(query, chunk):
                    found[by_key[bytes(key)]] = np.frombuffer(row, "<f4").astype(np.float32)
        return found

    def put(self, encoder_digest: str, rows: Mapping[str, Floats]) -> None:
        """Keep embeddings (D,) by text."""
        entries = [
            (_key(encoder_digest, t), row.astype("<f4").tobytes()) for t, row in rows.items()
        ]
        with self._opened() as database, database:
            database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", entries)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=30)
        try:
            database.executescript(_TABLES)
        except sqlite3.OperationalError:
            database.close()
            raise
        except sqlite3.DatabaseError as error:
            database.close()
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self.path.replace(aside)
            logger.warning("the embedding cache is damaged (%s); renamed to %s", error, aside)
            database = sqlite3.connect(self.path, timeout=30)
            database.executescript(_TABLES)
        with closing(database):
            yield database


def _key(encoder_digest: str, text: str) -> bytes:
    return hashlib.sha256(f"{encoder_digest}\n{text}".encode()).digest()


_TOP_LEVEL = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
    "cls_emb",
)


def read_text_tower(path: Path) -> dict[str, torch.Tensor]:
    """Read the text tower of a CLIP checkpoint; its other tensors are left in the file.

    Args:
        path: A TorchScript archive as OpenAI published them, a state dict of ``torch.save``, or a safetensors file.

    Returns:
        Tensors by the names that open_clip's ``TextTransformer`` gives them, float32 where they are numbers.

    Raises:
        CheckpointError: The file cannot be read, or holds no text tower.
    """
    tensors = read_state_dict(path, parts=(*_TOP_LEVEL, "text."))
    # Below ``text.`` in newer checkpoints, at the top in CLIP's.
    nested = {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}
    # The causal mask is computed, not learnt.
    tower = {n: t for n, t in (nested or tensors).items() if n.startswith(_TOP_LEVEL)}
    if "token_embedding.weight" not in tower:
        raise CheckpointError(
            f"{path} does not contain a CLIP text tower",
            hint="give a CLIP checkpoint of OpenAI or open_clip, or run: proxydet download clip-vit-b32",
            path=path,
        )
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tower.items()
    }


DEFAULT_MODEL = "ViT-B-32-quickgelu"
"""The text tower of the published embeddings: OpenAI's CLIP ViT-B/32."""

_CHUNK = 256
_LENGTH_STEP = 8


def default_clip_weights() -> Path:
    """Where ``proxydet download clip-vit-b32`` puts CLIP's weights."""
    return models_folder() / "clip" / "ViT-B-32.pt"


def open_encoder(
    path: Path | None = None, *, model: str = DEFAULT_MODEL, progress: Progress = SILENT
) -> TextEncoder:
    """Open a text encoder.

    Args:
        path: CLIP weights, or the ``.json`` of a `CompositionalEncoder`; None: CLIP ViT-B/32 where
            ``proxydet download`` puts it.
        model: open_clip's name of the model that the weights belong to.
        progress: Where long encodings are shown.

    Raises:
        VocabularyError: There are no weights.
    """
    if path is not None and path.suffix == ".json":
        return CompositionalEncoder.load(path)
    weights = path or default_clip_weights()
    if not weights.is_file():
        raise VocabularyError(
            f"embedding new class names needs the weights of CLIP's text encoder: {weights} does not exist",
            hint="run: proxydet download clip-vit-b32 (or give embeddings of your own as a .npy file)",
            path=weights,
            needs=("clip-vit-b32",) if path is None else (),
        )
    return ClipTextEncoder(weights, model=model, progress=progress)


class ClipTextEncoder:
    """CLIP's text tower through open_clip, loaded when a text is not in the cache.

    Args:
        weights: CLIP checkpoint.
        model: open_clip's name of the model; only models with a text transformer of open_clip's own serve.
        device: Where the tower runs.
        cache: Where embeddings are kept; None: a file in the user's cache folder.
        progress: Where long encodings are shown.

    Raises:
        VocabularyError: open_clip has no such model, or its text tower is of another kind.
    """

    def __init__(
        self,
        weights: Path,
        *,
        model: str = DEFAULT_MODEL,
        device: str = "cpu",
        cache: EmbeddingCache | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.weights = weights
        self.model = model
        self.device = device
        self.cache = cache or EmbeddingCache(cache_folder("embeddings") / "texts.sqlite")
        self.progress = progress
        self._lock = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """What the embeddings depend on besides the text: the model's name and the weights' SHA-256."""
        memory = self.cache.path.with_name("weights.json")
        return f"{self.model}:{remembered_sha256(self.weights, memory)}"

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return int(self._settings["output_dim"])

    def encode(self, names: Sequence[str]) -> Floats:
        """Embed texts.

        Args:
            names: Texts, as they are (put names into prompts before).

        Returns:
            (T, D) float32, not normalised.

        Raises:
            VocabularyError: A text is longer than the model's context.
            CheckpointError: The weights are not those of the model.
        """
        known = self.cache.get(self.digest, names)
        missing = [text for text in dict.fromkeys(names) if text not in known]
        if missing:
            with self._lock:
                fresh = self._encode_texts(missing)
            self.cache.put(self.digest, fresh)
            known.update(fresh)
        return np.stack([known[text] for text in names])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, start and end included; more than `context_length` cannot be encoded."""
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]

    @property
    def context_length(self) -> int:
        """Most tokens a text may have, start and end included."""
        return int(self._settings["context_length"])

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return _tower_settings(self.model)

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.SimpleTokenizer(context_length=self.context_length)

    @cached_property
    def _tower(self) -> torch.nn.Module:
        return _load_tower(self._settings, self.weights, self.model).to(self.device)

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Floats]:
        counts = self.token_counts(texts)
        long = [
            text for text, count in zip(texts, counts, strict=True) if count > self.context_length
        ]
        if long:
            raise VocabularyError(
                f"{len(long)} of the texts are longer than the {self.context_length} tokens that {self.model} "
                f"reads, the first: {long[0][:120]!r}",
                hint="shorten the name or the prompt",
            )
        # Texts of about the same length go together, so that none is padded far beyond its own length; and a
        # text's padding depends on itself alone, so that its embedding depends on its company by rounding at most.
        lengths = [self._padded(count) for count in counts]
        rows: dict[str, Floats] = {}
        with self.progress.task("embedding class names", total=len(texts), unit="texts") as task:
            for length in sorted(set(lengths)):
                group = [t for t, padded in zip(texts, lengths, strict=True) if padded == length]
                for start in range(0, len(group), _CHUNK):
                    chunk = group[start : start + _CHUNK]
                    rows.update(zip(chunk, self._run(chunk, length), strict=True))
                    task.advance(len(chunk))
        return rows

    def _padded(self, count: int) -> int:
        """Length to which a text of ``count`` tokens is padded."""
        if not self._settings["cut"]:
            return self.context_length
        return min(-(-count // _LENGTH_STEP) * _LENGTH_STEP, self.context_length)

    def _run(self, texts: Sequence[str], length: int) -> Floats:
        import torch

        tokens_TL = self._tokenizer(list(texts), context_length=length).to(self.device)
        # open_clip's tower adds a mask of its full context; a cut one is passed in instead of changing the tower.
        masks = {"attn_mask": _causal_mask(length).to(self.device)} if self._settings["cut"] else {}
        with torch.inference_mode():
            rows_TD = torch.func.functional_call(self._tower, masks, (tokens_TL,))
        encoded: Floats = rows_TD.float().cpu().numpy()
        return encoded


def _tower_settings(model: str) -> dict[str, Any]:
    """Look up the configuration of a model's text tower.

    Args:
        model: open_clip's name of the model.

    Returns:
        The arguments of open_clip's ``TextTransformer``, ``quick_gelu``, and ``cut``: whether its context can be cut to the
        length of the texts.

    Raises:
        VocabularyError: open_clip has no such model, or its text tower is of another kind.
    """
    import open_clip
    from open_clip.transformer import TextTransformer

    config = open_clip.get_model_config(model)
    if config is None:
        raise VocabularyError(
            f"open_clip has no model {model!r}",
            hint="see open_clip.list_models(); OpenAI's weights need ...-quickgelu",
        )
    text = {key: value for key, value in config["text_cfg"].items() if value is not None}
    accepted = set(inspect.signature(TextTransformer.__init__).parameters)
    foreign = sorted(set(text) - accepted)
    if foreign:
        raise VocabularyError(
            f"the text tower of {model!r} is not supported (it needs {', '.join(foreign)})",
            hint="encode the names with open_clip yourself and give the embeddings as a .npy file",
        )
    causal = text.get("pool_type", "argmax") == "argmax" and not text.get("no_causal_mask")
    return {
        "context_length": 77,
        **text,
        "output_dim": config["embed_dim"],
        "quick_gelu": bool(config.get("quick_gelu")),
        # Behind the end token nothing is read, so padding can be left out.
        "cut": causal and not text.get("embed_cls"),
    }


def _load_tower(settings: dict[str, Any], weights: Path, model: str) -> torch.nn.Module:
    """Build a text tower with its weights.

    Args:
        settings: What `_tower_settings` gave.
        weights: CLIP checkpoint.
        model: The model's name, for messages.

    Raises:
        CheckpointError: The weights cannot be read, or are not those of the model.
    """
    import torch
    from open_clip.transformer import QuickGELU, TextTransformer

    arguments = {k: v for k, v in settings.items() if k not in ("quick_gelu", "cut")}
    with torch.device("meta"):
        tower = TextTransformer(
            **arguments, act_layer=QuickGELU if settings["quick_gelu"] else torch.nn.GELU
        )
    given = read_text_tower(weights)
    expected = tower.state_dict()
    wrong = sorted(
        {name for name in expected if name not in given}
        | {name for name in given if name not in expected}
        | {name for name in given if name in expected and given[name].shape != expected[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"{weights} does not fit the text tower of {model}: {len(wrong)} tensors differ in name or shape, "
            f"the first: {', '.join(wrong[:3])}",
            hint="name the open_clip model that the weights belong to",
            path=weights,
        )
    tower.load_state_dict(given, assign=True)
    if tower.attn_mask is not None:
        # Not in checkpoints, and made on the meta device above.
        tower.attn_mask = _causal_mask(tower.num_pos)
    logger.info("loaded the text tower of %s from %s", model, weights)
    ready: torch.nn.Module = tower.eval()
    return ready


def _causal_mask(length: int) -> torch.Tensor:
    """Return what is added to attention so that no token sees a later one: (length, length), 0 or minus infinity."""
    import torch

    return torch.full((length, length), float("-inf")).triu_(1)
