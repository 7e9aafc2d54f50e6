"""Text encoders: from class names to embeddings; and CLIP's image tower, which embeds images in the same space.

Dimensions: C classes, T texts, L tokens, N images, D embedding.
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
    return _as_float(tower)


def _as_float(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


DEFAULT_MODEL = "ViT-B-32-quickgelu"
"""The text tower of the published embeddings: OpenAI's CLIP ViT-B/32."""

_CHUNK = 256
_LENGTH_STEP = 8
_IMAGES_AT_ONCE = 32


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
    weights = path or models_folder() / "clip" / "ViT-B-32.pt"
    if not weights.is_file():
        raise VocabularyError(
            f"embedding new class names needs the weights of CLIP's text encoder: {weights} does not exist",
            hint="run: proxydet download clip-vit-b32 (or give embeddings of your own as a .npy file)",
            path=weights,
            needs=("clip-vit-b32",) if path is None else (),
        )
    return ClipTextEncoder(weights, model=model, progress=progress)


class ClipTextEncoder:
    """CLIP's text tower through open_clip, loaded when a text is not in the cache; and its image tower, when an image is embedded.

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

    def encode_images(self, images: Sequence[npt.NDArray[np.uint8]]) -> Floats:
        """Embed images in the space of the texts, by the image tower of the same weights.

        Args:
            images: RGB (H, W, 3), each scaled to the tower's square; crops should be squares.

        Returns:
            (N, D) float32, not normalised.

        Raises:
            VocabularyError: open_clip has no such model, or its image tower is of another kind.
            CheckpointError: The weights have no image tower, or are not those of the model.
        """
        import torch
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        from PIL import Image

        with self._lock:
            tower, (height, width) = self._image_tower
        rows = [np.zeros((0, self.dim), np.float32)]
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            scaled = [
                Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                for pixels in images[start : start + _IMAGES_AT_ONCE]
            ]
            value_NHW3 = np.stack([np.asarray(each, np.float32) / 255 for each in scaled])
            value_NHW3 = (value_NHW3 - OPENAI_DATASET_MEAN) / OPENAI_DATASET_STD
            given = torch.from_numpy(value_NHW3.astype(np.float32)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                rows.append(tower(given.to(self.device)).float().cpu().numpy())
        return np.concatenate(rows)

    @cached_property
    def _image_tower(self) -> tuple[torch.nn.Module, tuple[int, int]]:
        """The tower, and height and width of what it takes."""
        import torch
        from open_clip.model import CLIP

        config = _model_config(self.model)
        vision = config["vision_cfg"]
        if vision.get("timm_model_name"):
            raise VocabularyError(
                f"the image tower of {self.model!r} is not supported (it is timm's {vision['timm_model_name']})",
                hint="take a model with an image tower of open_clip's own, such as ViT-B-32-quickgelu",
            )
        with torch.device("meta"):
            quick = bool(config.get("quick_gelu"))
            tower = CLIP(config["embed_dim"], vision, {}, quick_gelu=quick).visual
        tensors = read_state_dict(self.weights, parts=("visual.",))
        if not tensors:
            raise CheckpointError(
                f"{self.weights} does not contain a CLIP image tower",
                hint="give a whole CLIP checkpoint of OpenAI or open_clip, or run: proxydet download clip-vit-b32",
                path=self.weights,
            )
        given = _as_float({name.removeprefix("visual."): t for name, t in tensors.items()})
        size = vision.get("image_size", 224)
        ready = _with_weights(tower, given, self.weights, f"the image tower of {self.model}")
        return ready.to(self.device), (size, size) if isinstance(size, int) else tuple(size)

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
        import torch
        from open_clip.transformer import QuickGELU, TextTransformer

        arguments = {k: v for k, v in self._settings.items() if k not in ("quick_gelu", "cut")}
        with torch.device("meta"):
            tower = TextTransformer(
                **arguments,
                act_layer=QuickGELU if self._settings["quick_gelu"] else torch.nn.GELU,
            )
        given = read_text_tower(self.weights)
        ready = _with_weights(tower, given, self.weights, f"the text tower of {self.model}")
        if tower.attn_mask is not None:
            # Not in checkpoints, and made on the meta device above.
            tower.attn_mask = _causal_mask(tower.num_pos)
        return ready.to(self.device)

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
        lengths = [self.context_length] * len(counts)
        if self._settings["cut"]:
            steps = [-(-count // _LENGTH_STEP) * _LENGTH_STEP for count in counts]
            lengths = [min(length, self.context_length) for length in steps]
        rows: dict[str, Floats] = {}
        with self.progress.task("embedding class names", total=len(texts), unit="texts") as task:
            for length in sorted(set(lengths)):
                group = [t for t, padded in zip(texts, lengths, strict=True) if padded == length]
                for start in range(0, len(group), _CHUNK):
                    chunk = group[start : start + _CHUNK]
                    rows.update(zip(chunk, self._run(chunk, length), strict=True))
                    task.advance(len(chunk))
        return rows

    def _run(self, texts: Sequence[str], length: int) -> Floats:
        import torch

        tokens_TL = self._tokenizer(list(texts), context_length=length).to(self.device)
        # open_clip's tower adds a mask of its full context; a cut one is passed in instead of changing the tower.
        masks = {"attn_mask": _causal_mask(length).to(self.device)} if self._settings["cut"] else {}
        with torch.inference_mode():
            rows_TD = torch.func.functional_call(self._tower, masks, (tokens_TL,))
        encoded: Floats = rows_TD.float().cpu().numpy()
        return encoded


def _model_config(model: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model; VocabularyError where it has none."""
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise VocabularyError(
            f"open_clip has no model {model!r}",
            hint="see open_clip.list_models(); OpenAI's weights need ...-quickgelu",
        )
    return config


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
    from open_clip.transformer import TextTransformer

    config = _model_config(model)
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


def _with_weights(
    tower: torch.nn.Module, given: dict[str, torch.Tensor], weights: Path, title: str
) -> torch.nn.Module:
    """Put weights into a tower that was built without; CheckpointError where they are not its own.

    Args:
        tower: On the meta device.
        given: What to put into it, by name.
        weights: The file that they are of.
        title: What to call the tower in messages.
    """
    expected = tower.state_dict()
    wrong = sorted(
        {name for name in expected if name not in given}
        | {name for name in given if name not in expected}
        | {name for name in given if name in expected and given[name].shape != expected[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"{weights} does not fit {title}: {len(wrong)} tensors differ in name or shape, the first: {', '.join(wrong[:3])}",
            hint="name the open_clip model that the weights belong to",
            path=weights,
        )
    tower.load_state_dict(given, assign=True)
    logger.info("loaded %s from %s", title, weights)
    return tower.eval()


def _causal_mask(length: int) -> torch.Tensor:
    """Return what is added to attention so that no token sees a later one: (length, length), 0 or minus infinity."""
    import torch

    return torch.full((length, length), float("-inf")).triu_(1)
