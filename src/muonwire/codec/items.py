"""Chosen items on their way between a device and the packers of the host: numbered inside their group, in few bits."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from muonwire.codec import packing
from muonwire.codec.host import Field, octets, on_host, send
from muonwire.codec.pack import Pack
from muonwire.codec.quantize.bits import pack_codes, unpack_codes
from muonwire.codec.select.base import Groups

# Groups of so many items or fewer have codes of 1 to 8 bits.
LARGEST_CODED = 256
_LARGEST_SHORT = 1 << 15


def _width(groups: Groups) -> int:
    return max((groups.group_numel - 1).bit_length(), 1)


def field(items: Tensor, groups: Groups, pack: Pack) -> Field:
    """What ``pack`` writes of sorted items (int64), ``groups.k`` of each group."""
    if on_host(items.device):
        return Field(items, lambda found: pack.encode(found, groups))
    starts = torch.arange(groups.num_groups, device=items.device).unsqueeze(1) * groups.group_numel
    inside = (items.view(groups.num_groups, groups.k) - starts).view(-1)
    if groups.group_numel <= LARGEST_CODED:
        packed = packing.pack(inside, _width(groups))
        return Field(
            packed,
            lambda found: pack.encode(
                _numbered(unpack_codes(found.tobytes(), groups.count, _width(groups)), groups), groups
            ),
        )
    dtype = torch.int16 if groups.group_numel <= _LARGEST_SHORT else torch.int32
    narrow = inside.to(dtype if groups.group_numel <= 1 << 31 else torch.int64)
    return Field(narrow, lambda found: pack.encode(_numbered(found, groups), groups))


def _numbered(inside: Any, groups: Groups) -> Any:
    """Items numbered through all groups, as numpy's int64."""
    starts = np.arange(groups.num_groups, dtype=np.int64)[:, None] * groups.group_numel
    return (inside.reshape(groups.num_groups, groups.k) + starts).reshape(-1)


def on_device(items: Any, groups: Groups, device: torch.device) -> Tensor:
    """Items that a packer has read (numpy's int64) as a tensor (int64) on ``device``."""
    if on_host(device):
        return torch.from_numpy(items)
    starts = np.arange(groups.num_groups, dtype=np.int64)[:, None] * groups.group_numel
    inside = (items.reshape(groups.num_groups, groups.k) - starts).reshape(-1)
    if groups.group_numel <= LARGEST_CODED:
        codes = octets(pack_codes(inside.astype(np.uint8), _width(groups)), device)
        there = packing.unpack(codes, groups.count, _width(groups)).to(torch.int64)
    else:
        dtype = np.int16 if groups.group_numel <= _LARGEST_SHORT else np.int32
        narrow = inside.astype(dtype if groups.group_numel <= 1 << 31 else np.int64)
        there = send(torch.from_numpy(narrow), device).to(torch.int64)
    firsts = torch.arange(groups.num_groups, device=device).unsqueeze(1) * groups.group_numel
    return (there.view(groups.num_groups, groups.k) + firsts).view(-1)
