"""Images as the pixel values a checkpoint's own image processor makes of them, batch by batch.

Shapes: N images, B images of a batch, C channels, H x W pixels the model takes, L positions.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.image_files import ImageFile, image_files
from adaconvert.data.labels import check_single_label
from adaconvert.data.rows import TEXT_FIELD, opened
from adaconvert.data.tokens import TokenBlocks, base_type
from adaconvert.errors import DataError, OptionError, ResourceError
from adaconvert.io.names import escape
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

#: what holds the path of an image, where rows are not said to hold it elsewhere.
IMAGE_FIELD = "image"
#: a checkpoint has an image processor when it has one of these.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: family -> positions of its models besides those of the patches.
_FAMILIES = {"vit": 1}
#: what is decoded; Pillow knows more, and starts other programs for some of them.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PIECE = 1 << 20


def takes_images(architecture: str) -> bool:
    """Return whether a model of this class classifies images."""
    return architecture.endswith("ForImageClassification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What makes the input of a model from images.

    Attributes:
        call: the transformers image processor.
        shape: (C, H, W) the model takes.
        positions: L, of one image.
    """

    call: Any
    shape: tuple[int, int, int]
    positions: int

    @property
    def mode(self) -> str:
        """Return what Pillow calls the colours the model takes."""
        return "L" if self.shape[0] == 1 else "RGB"

    def facts(self) -> str:
        """Return what the pixel values depend on besides the images."""
        return json.dumps(self.call.to_dict(), sort_keys=True, default=str) + repr(self.shape)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in order, opened when they are needed.

    Attributes:
        files: where they lie, and their classes where these were asked for.
        processor: makes pixel values of them.
    """

    files: tuple[ImageFile, ...]
    processor: Processor
    #: the last batch, which every variant of a model is run on in turn.
    _last: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def unit(self) -> str:
        """Return what they are called in reports."""
        return "images"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return where each comes from."""
        return tuple(file.name for file in self.files)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """Return the class of each; -1 where none was asked for."""
        return tuple(-1 if file.label is None else file.label for file in self.files)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Return the sha256 of every file; reads them all."""
        return tuple(_digest_of(file) for file in self.files)

    @cached_property
    def digest(self) -> str:
        """Return one sha256 over the content of the files, whatever they are called."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    def unique(self) -> Images:
        """Return them without those that are equal to an earlier one."""
        first = dict(zip(reversed(self.digests), reversed(self.files), strict=True))
        return Images(files=tuple(reversed(first.values())), processor=self.processor)

    def batches(self, size: int) -> list[list[int]]:
        """Return which images run together."""
        places = list(range(len(self)))
        return [places[start : start + size] for start in range(0, len(self), size)]

    def inputs(self, model: Any, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the arguments of the one call that runs `model` on some of them."""
        return [{"pixel_values": self.pixels(rows).to(model.device)}]

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Return float32 pixel values of some of them, [B, C, H, W].

        Raises:
            DataError: one cannot be read as an image, or the processor does not fit the model.
        """
        wanted = tuple(int(row) for row in rows)
        if not self._last or self._last[0][0] != wanted:
            self._last[:] = [(wanted, _pixels([self.files[row] for row in wanted], self.processor))]
        return self._last[0][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBlocks(TokenBlocks):
    """Images as blocks of positions, for what runs on blocks of tokens.

    Attributes:
        ids: zeros [N, L]; there are none.
        document: int64 [N], which of the images each block is.
        weights: bool [N, L], all true.
        digest: sha256 over the images and their processor.
        images: what they are.
    """

    images: Images

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Return float32 pixel values of some blocks, [B, C, H, W]."""
        return self.images.pixels([int(self.document[row]) for row in rows])


def read_images(
    where: str | Path | Sequence[str],
    folder: Path,
    config: Any,
    *,
    field: str = IMAGE_FIELD,
    label_field: str | None = None,
    split: str | None = None,
    max_documents: int | None = None,
) -> Images:
    """Return images for the classifier in `folder`; none of them is opened yet.

    Args:
        where: a folder of one folder for each class, a .jsonl, .json or .csv file, or several.
        folder: the checkpoint, which holds the image processor.
        config: its transformers config, which names the classes.
        field: of rows, what holds the path; the default for text means "image".
        label_field: of rows, what holds the class; None when no class is needed.
        split: of a folder, the part of it to read.
        max_documents: images to read of each of `where`, None for all.

    Raises:
        DataError: missing or empty data, a label the model does not have, or no image processor.
        OptionError: the model is of a kind that is not run on images here.
        ResourceError: they may not be read, or Pillow is not installed.
    """
    if label_field is not None:
        check_single_label(config, "an image")
    processor = load_processor(folder, config)
    files: list[ImageFile] = []
    for one in (where,) if isinstance(where, str | Path) else where:
        files += image_files(
            one,
            config,
            field=IMAGE_FIELD if field == TEXT_FIELD else field,
            label_field=label_field,
            split=split,
            max_images=max_documents,
        )
    if not files:
        raise DataError("no data given", where="--data")
    return Images(files=tuple(files), processor=processor)


def image_blocks(
    images: Images, *, max_tokens: int | None = None, seed: int | None = None
) -> ImageBlocks:
    """Return images as blocks.

    Args:
        images: what to take.
        max_tokens: positions after which to stop, None for all; at least one image is taken.
        seed: of their order, None for the order they are in.
    """
    import numpy

    length = images.processor.positions
    order = numpy.arange(len(images))
    if seed is not None:
        order = numpy.random.Generator(numpy.random.Philox(seed)).permutation(len(images))
    if max_tokens is not None:
        order = order[: max(1, max_tokens // length)]
    digest = hashlib.sha256(images.processor.facts().encode())
    for place in order:
        digest.update(images.digests[place])
    shape = (len(order), length)
    return ImageBlocks(
        ids=numpy.broadcast_to(numpy.int64(0), shape),
        document=order.astype(numpy.int64),
        weights=numpy.broadcast_to(numpy.bool_(True), shape),
        digest=digest.hexdigest(),
        images=images,
    )


def load_processor(folder: Path, config: Any) -> Processor:
    """Return the image processor of a checkpoint; no code of the checkpoint runs.

    Raises:
        DataError: there is none, or transformers cannot load it.
        OptionError: the model is of a kind that is not run on images here.
        ResourceError: Pillow is not installed.
    """
    values: Mapping[str, object] = config.to_dict()
    family = base_type(values) or str(values.get("model_type"))
    if family not in _FAMILIES:
        raise OptionError(
            "models of this kind are not run on images",
            where="config.json: model_type",
            expected=", ".join(_FAMILIES),
            found=escape(family, 60),
        )
    _check_pillow()
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise DataError(
            "the checkpoint has no image processor",
            where=escape(folder.name),
            expected=f"one of {', '.join(PROCESSOR_FILES)}",
            hint="Copy it from the model this checkpoint was made from.",
        )
    from transformers import AutoConfig

    # transformers 5.17 shows the name at the top only where torchvision is installed
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        with quiet():
            call = AutoImageProcessor.from_pretrained(
                str(folder),
                backend="pil",
                config=AutoConfig.for_model(family),
                trust_remote_code=False,
                local_files_only=True,
            )
    # foreign files, about which transformers raises what it likes
    except Exception as error:
        raise DataError(
            f"the image processor cannot be loaded ({type(error).__name__})",
            where=escape(folder.name),
        ) from error
    height, width = _sides(config.image_size)
    down, across = _sides(config.patch_size)
    return Processor(
        call=call,
        shape=(int(config.num_channels), height, width),
        positions=(height // down) * (width // across) + _FAMILIES[family],
    )


def _check_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "not installed: images are read with it",
            where="package Pillow",
            hint='Run: pip install "adaconvert[images]"',
        ) from error


def _sides(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pixels(files: Sequence[ImageFile], processor: Processor) -> Tensor:
    import torch

    opened_images = [_decoded(file, processor.mode) for file in files]
    try:
        with quiet():
            found = processor.call(images=opened_images, return_tensors="np")["pixel_values"]
            pixels = torch.as_tensor(found, dtype=torch.float32)
    # settings are foreign data, and images of any size meet them
    except Exception as error:
        raise DataError(
            f"the image processor of the checkpoint fails ({type(error).__name__})",
            where=files[0].name,
            found=f"'{escape(error, 120)}'",
        ) from error
    if tuple(pixels.shape[1:]) != processor.shape:
        raise DataError(
            "the image processor of the checkpoint does not fit its model",
            where=files[0].name,
            expected=f"pixel values of {_shape(processor.shape)}",
            found=_shape(pixels.shape[1:]),
            hint="Copy preprocessor_config.json of the model this checkpoint was made from.",
        )
    return pixels


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(str(int(size)) for size in sizes)


def _decoded(file: ImageFile, mode: str) -> Any:
    """Return a Pillow image, the right way up."""
    from PIL import Image, ImageOps

    with opened(file.path, file.name) as raw:
        try:
            with warnings.catch_warnings():
                # what unpacks to more pixels than Pillow finds plausible is refused
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(raw, formats=_FORMATS)
                return ImageOps.exif_transpose(image).convert(mode)
        # decoders of foreign bytes, which raise what they like
        except Exception as error:
            raise DataError(
                "cannot be read as an image",
                where=file.name,
                expected=f"one of {', '.join(_FORMATS)}",
                found=f"{type(error).__name__} in {escape(file.path.name, 80)}",
                hint="Replace the file, or leave it out.",
            ) from error


def _digest_of(file: ImageFile) -> bytes:
    digest = hashlib.sha256()
    with opened(file.path, file.name) as raw:
        while piece := raw.read(_PIECE):
            digest.update(piece)
    return digest.digest()
