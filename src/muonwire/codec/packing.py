"""Codes of a few bits, packed on the device that they are on, in the layout of pack.fields.pack_fields.

On the CPU numpy does it (quantize/bits.py); everywhere else operations on whole tensors. Both give the same bytes.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack codes (1-D, uint8 or bool) below 2^width (width 1 to 8), low bit first: (count · width + 7) // 8 bytes.

    >>> bytes(pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()).hex()
    '2103'
    """
    count = codes.numel()
    eights = _eights(codes.to(torch.uint8))
    # Eight codes make ``width`` bytes of one word.
    words = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= eights[:, i].to(torch.int64) << (width * i)
    octets = words.view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)
    return octets[: (count * width + 7) // 8]


def unpack(octets: Tensor, count: int, width: int) -> Tensor:
    """The inverse of ``pack`` for ``count`` codes (uint8).

    >>> unpack(torch.tensor([0x21, 0x03], dtype=torch.uint8), 3, 4)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    num_words = -(-count // 8)
    used = torch.zeros(num_words * width, dtype=torch.uint8, device=octets.device)
    used[: len(octets)] = octets[: len(used)]
    words = torch.zeros(num_words, 8, dtype=torch.uint8, device=octets.device)
    words[:, :width] = used.view(num_words, width)
    wide = words.view(-1).view(torch.int64)
    codes = torch.empty_like(words)
    for i in range(8):
        codes[:, i] = (wide >> (width * i)) & ((1 << width) - 1)
    return codes.view(-1)[:count]


def _eights(codes: Tensor) -> Tensor:
    """Rows of eight codes, the last filled up with zeros."""
    missing = -codes.numel() % 8
    return (torch.cat([codes, codes.new_zeros(missing)]) if missing else codes).view(-1, 8)
