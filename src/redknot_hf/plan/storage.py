"""How a head's cold pages are stored, and the bytes that this takes."""

from typing import Any

STORAGES = ("model", "int8", "int4")

# The last tokens, which stay as the model made them: RedKnotCache's default.
HOT = 128
PAGE_SIZE = 64

_BITS = {"int8": 8, "int4": 4}
_ITEMSIZE = {"float8_e4m3fn": 1, "float8_e5m2": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def cold_pages(length: int, page_size: int, hot: int) -> int:
    """Pages of a row of `length` tokens that are cold: full, behind the last `hot` tokens, and not the first."""
    return max((length - hot) // page_size - 1, 0)


def cold_page_nbytes(storage: str, page_size: int, key_dim: int, value_dim: int) -> int:
    """Bytes of a cold page: its integers, in fp16 a scale and a zero for each channel of K and each token of V."""
    return page_size * (key_dim + value_dim) * _BITS[storage] // 8 + 4 * (key_dim + page_size) + 16


def itemsize(dtype: Any) -> int:
    """Bytes of an element of a dtype, given as such, by name, or by the bytes themselves.

    Raises:
        ValueError: There is no such dtype.
    """
    size = getattr(dtype, "itemsize", dtype)
    if isinstance(size, str):
        size = _ITEMSIZE.get(size.removeprefix("torch."))
    if type(size) is not int or size < 1:
        raise ValueError(f"dtype is {dtype!r}: give a torch or numpy dtype, bytes, or one of {', '.join(_ITEMSIZE)}")
    return size
