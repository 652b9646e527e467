"""Image files of many kinds, made with PIL and by hand, and what each must look like.

Legend: `PICTURE` is 48×64 smooth colours; expected pixels are uint8 [height, width, 3].
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image, features
from tiny import encoded, picture

PICTURE = picture(7, 48, 64)
OTHER = picture(8, 48, 64)
RGB = np.asarray(PICTURE)
GREY = PICTURE.convert("L")
GREY_RGB = np.asarray(GREY.convert("RGB"))
ALPHA = Image.fromarray(np.arange(48 * 64).reshape(48, 64).astype(np.uint8))
PALETTE = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=14)
BLACK_OR_WHITE = GREY.convert("1")
# 16 bits of which the lower ones are noise.
NOISE = np.random.default_rng(0).integers(0, 256, RGB.shape, dtype=np.uint16)
DEEP_RGB = RGB.astype(np.uint16) * 256 + NOISE
DEEP_GREY = np.asarray(GREY).astype(np.uint16) * 256 + NOISE[..., 0]

Case = tuple[bytes, np.ndarray]


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def turned(pixels: np.ndarray, tag: int) -> np.ndarray:
    """What EXIF orientation `tag` means: where row 0 and column 0 of the stored pixels are to be seen."""
    if tag >= 5:  # row 0 is at the left or the right
        pixels = pixels.transpose(1, 0, 2)
    if tag in (3, 4, 7, 8):  # upside down
        pixels = pixels[::-1]
    if tag in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def exif(tag: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = tag
    return tags


def png(pixels: np.ndarray, depth: int, colour: int, extra: bytes = b"", missing: int = 0) -> bytes:
    """A PNG of samples [height, width, channels], written without PIL, which writes no 16-bit colours."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    big = pixels.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in big)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)[: -missing or None])
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bmp(bits: int, rows: bytes, compression: int, palette: bytes = b"", masks: bytes = b"") -> bytes:
    """A BMP of 48×64 pixels whose rows are coded already."""
    start = 14 + 40 + len(masks) + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, bits, compression, len(rows), 2835, 2835, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + masks + palette + rows


def bmp_565() -> Case:
    channels = RGB.astype(np.uint16)
    packed = (channels[..., 0] >> 3 << 11) | (channels[..., 1] >> 2 << 5) | (channels[..., 2] >> 3)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return bmp(16, packed[::-1].astype("<u2").tobytes(), 3, masks=masks), RGB


def bmp_run_lengths() -> Case:
    """Four bits a pixel in runs of one colour."""
    rows = b""
    for row in np.asarray(PALETTE)[::-1]:
        rows += b"".join(bytes([1, index << 4]) for index in row.tolist()) + b"\0\0"
    colours = np.zeros((16, 4), np.uint8)
    known = np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[:16]
    colours[: len(known), :3] = known[:, ::-1]
    return bmp(4, rows + b"\0\1", 2, colours.tobytes()), rgb(PALETTE)


def pgm_of_10_bits() -> Case:
    samples = (DEEP_GREY.astype(np.uint32) * 1023 // 65535).astype(">u2")
    return b"P5 64 48 1023\n" + samples.tobytes(), GREY_RGB


def animated(kind: str, first: Image.Image = PICTURE, **options: object) -> bytes:
    return encoded(first, kind, save_all=True, append_images=[OTHER, OTHER], duration=100, **options)


def with_alpha(mode: str) -> Image.Image:
    image = PICTURE.convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(ALPHA)
    return image


def with_faulty_exif(tag: int) -> bytes:
    """An EXIF block in which the entry beside the orientation points far behind its end."""
    tags = exif(tag)
    tags[0x010F] = "a maker's name"
    block = bytearray(tags.tobytes())
    entry = block.index(b"\x01\x0f" if b"MM" in block[:8] else b"\x0f\x01")
    block[entry + 4 : entry + 8] = b"\0\x01\0\0"  # its length
    return encoded(PICTURE, exif=bytes(block), quality=95)


def with_stray_marker(data: bytes) -> bytes:
    """A JPEG with an unknown marker in the midst of its coded pixels, which PIL refuses and DALI does not."""
    middle = len(data) - 400
    return data[:middle] + b"\xff\x02" + data[middle:]


def good_files() -> dict[str, Case]:
    """File name -> its bytes and the pixels that every decoder must give, to what its compression loses."""
    jpeg = encoded(PICTURE, quality=95)
    cases: dict[str, Case] = {
        "plain.jpg": (jpeg, RGB),
        "progressive.jpg": (encoded(PICTURE, quality=95, progressive=True), RGB),
        "restarts.jpg": (encoded(PICTURE, quality=95, restart_marker_rows=1), RGB),
        "full colour.jpg": (encoded(PICTURE, quality=95, subsampling=0), RGB),
        "coded as rgb.jpg": (encoded(PICTURE, quality=95, keep_rgb=True), RGB),
        "grey.jpg": (encoded(GREY, quality=95), GREY_RGB),
        "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), quality=95), rgb(PICTURE.convert("CMYK"))),
        "more behind its end.jpg": (jpeg + b"camera data" * 9, RGB),
        "a byte behind its end.jpg": (jpeg + b"\0", RGB),
        "a second picture.jpg": (encoded(PICTURE, "MPO", save_all=True, append_images=[OTHER], quality=95), RGB),
        "no exif at all.jpg": (encoded(PICTURE, quality=95, exif=b"Exif\0\0no TIFF header"), RGB),
        "rgb.png": (encoded(PICTURE, "PNG"), RGB),
        "grey.png": (encoded(GREY, "PNG"), GREY_RGB),
        "one bit.png": (encoded(BLACK_OR_WHITE, "PNG"), rgb(BLACK_OR_WHITE)),
        "four bits.png": (encoded(PALETTE, "PNG", bits=4), rgb(PALETTE)),
        "16-bit grey.png": (png(DEEP_GREY[..., None], 16, 0), GREY_RGB),
        "16-bit rgb.png": (png(DEEP_RGB, 16, 2), RGB),
        "16-bit rgba.png": (png(np.concatenate([DEEP_RGB, NOISE[..., :1] * 257], 2), 16, 6), RGB),
        "rgba.png": (encoded(with_alpha("RGBA"), "PNG"), RGB),
        "grey with alpha.png": (encoded(with_alpha("LA"), "PNG"), GREY_RGB),
        "transparent palette.png": (encoded(PALETTE, "PNG", transparency=bytes(range(0, 140, 10))), rgb(PALETTE)),
        "transparent colour.png": (encoded(PICTURE, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
        "gamma and profile.png": (
            png(RGB, 8, 2, chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"sRGB", b"\0")),
            RGB,
        ),
        "short of its check sum.png": (png(RGB, 8, 2, missing=4), RGB),
        "with a wrong check sum.png": (png(RGB, 8, 2)[:-16] + b"none" + png(RGB, 8, 2)[-12:], RGB),
        "more behind its end.png": (png(RGB, 8, 2) + b"more", RGB),
        "text behind.png": (png(RGB, 8, 2)[:-12] + chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b""), RGB),
        "moving.png": (animated("PNG"), RGB),
        "moving, with a still.png": (animated("PNG", default_image=True), RGB),
        "moving and transparent.png": (animated("PNG", with_alpha("RGBA")), RGB),
        "lossless.webp": (encoded(PICTURE, "WEBP", lossless=True), RGB),
        "transparent.webp": (encoded(with_alpha("RGBA"), "WEBP", lossless=True, exact=True), RGB),
        "moving.webp": (animated("WEBP", lossless=True), RGB),
        "rgb.bmp": (encoded(PICTURE, "BMP"), RGB),
        "palette.bmp": (encoded(PALETTE, "BMP"), rgb(PALETTE)),
        "one bit.bmp": (encoded(BLACK_OR_WHITE, "BMP"), rgb(BLACK_OR_WHITE)),
        "with alpha.bmp": (encoded(with_alpha("RGBA"), "BMP"), RGB),
        "565.bmp": bmp_565(),
        "run lengths.bmp": bmp_run_lengths(),
        "rgb.ppm": (encoded(PICTURE, "PPM"), RGB),
        "16-bit.pgm": (b"P5 64 48 65535\n" + DEEP_GREY.astype(">u2").tobytes(), GREY_RGB),
        "10-bit.pgm": pgm_of_10_bits(),
        "one bit.pbm": (encoded(BLACK_OR_WHITE, "PPM"), rgb(BLACK_OR_WHITE)),
        "rgb.tif": (encoded(PICTURE, "TIFF"), RGB),
        "16-bit.tif": (encoded(Image.fromarray(DEEP_GREY), "TIFF"), GREY_RGB),
        "cmyk.tif": (encoded(PICTURE.convert("CMYK"), "TIFF"), rgb(PICTURE.convert("CMYK"))),
        "ycbcr.tif": (encoded(PICTURE, "TIFF", compression="jpeg", quality=95), RGB),
        "two pages.tif": (encoded(PICTURE, "TIFF", save_all=True, append_images=[OTHER.resize((30, 30))]), RGB),
        "transparent.tif": (encoded(with_alpha("RGBA"), "TIFF"), RGB),
        "fax.tif": (encoded(BLACK_OR_WHITE, "TIFF", compression="group4"), rgb(BLACK_OR_WHITE)),
    }
    for mode, pixels in (("RGB", RGB), ("RGBA", RGB), ("L", GREY_RGB)):
        image = with_alpha(mode) if mode == "RGBA" else PICTURE.convert(mode)
        for method in ("packbits", "tiff_lzw", "tiff_adobe_deflate"):
            predictor = {} if method == "packbits" else {"tiffinfo": {317: 2}}
            cases[f"{mode} {method}.tif"] = (encoded(image, "TIFF", compression=method, **predictor), pixels)
    for tag in range(9):
        cases[f"turned {tag}.jpg"] = (encoded(PICTURE, quality=95, exif=exif(tag)), turned(RGB, tag))
        cases[f"turned {tag}.png"] = (encoded(PICTURE, "PNG", exif=exif(tag)), turned(RGB, tag))
        cases[f"turned {tag}.webp"] = (encoded(PICTURE, "WEBP", lossless=True, exif=exif(tag)), turned(RGB, tag))
        cases[f"turned {tag}.tif"] = (encoded(PICTURE, "TIFF", tiffinfo={0x0112: tag}), turned(RGB, tag))
        cases[f"faulty {tag}.jpg"] = (with_faulty_exif(tag), turned(RGB, tag))
    if features.check("jpg_2000"):
        cases["rgb.jp2"] = (encoded(PICTURE, "JPEG2000"), RGB)
        cases["transparent.jp2"] = (encoded(with_alpha("RGBA"), "JPEG2000"), RGB)
        cases["16-bit.jp2"] = (encoded(Image.fromarray(DEEP_GREY), "JPEG2000"), GREY_RGB)
    return cases


def bad_files() -> dict[str, bytes]:
    """Files that are images by their headers and cannot be decoded, or whose samples have no one meaning."""
    jpeg = encoded(PICTURE, quality=95)
    return {
        "cut.jpg": jpeg[:-300],
        "without its end.jpg": jpeg[:-2],
        "a stray marker.jpg": with_stray_marker(jpeg),
        "bad profile behind.png": png(RGB, 8, 2)[:-12] + chunk(b"iCCP", b"a\0\7") + chunk(b"IEND", b""),
        "cut.png": encoded(PICTURE, "PNG")[:-2000],
        "16-bit, cut.png": png(DEEP_RGB, 16, 2)[:-3000],
        "cut.bmp": encoded(PICTURE, "BMP")[:-2000],
        "cut.tif": encoded(PICTURE, "TIFF", compression="tiff_lzw")[:900],
        "cut.webp": encoded(PICTURE, "WEBP", lossless=True)[:-500],
        "cut.ppm": encoded(PICTURE, "PPM")[:-500],
        "floating point.tif": encoded(Image.fromarray(RGB[..., 0] / np.float32(255)), "TIFF"),
        "32-bit.tif": encoded(Image.fromarray(DEEP_GREY.astype(np.int32) * 1000), "TIFF"),
        "moving.gif": animated("GIF"),
    }
