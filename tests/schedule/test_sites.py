from __future__ import annotations

import pytest
from torch import nn

from harmonica_rt import find_sites
from harmonica_rt.errors import SiteError
from harmonica_rt.schedule.sites import check_sites
from tests.models import SITES, Block, stack


class FluxLikeBlock(nn.Module):
    """Attention and MLP side by side, joined by one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.proj_mlp = nn.Linear(4, 8)
        self.proj_out = nn.Linear(12, 4)
        self.attn = nn.MultiheadAttention(4, 1)


def test_rule_finds_attention_and_feed_forward_in_block_order() -> None:
    expected = [f"blocks.{i}.{child}" for i in range(3) for child in ("attn", "mlp")]
    assert find_sites(stack()) == expected


def test_rule_takes_only_the_joint_projection_of_a_parallel_block() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(FluxLikeBlock() for _ in range(2))
    assert find_sites(model) == ["blocks.0.proj_out", "blocks.1.proj_out"]


def test_rule_passes_over_lists_of_unlike_modules() -> None:
    model = nn.Module()
    model.mixed = nn.ModuleList([stack().blocks[0], nn.Linear(2, 2)])
    with pytest.raises(SiteError, match="no sites were found in Module"):
        find_sites(model)


def test_globs_keep_the_order_of_the_model_not_of_the_patterns() -> None:
    model = stack()
    assert find_sites(model, SITES[::-1]) == find_sites(model)
    assert find_sites(model, ["blocks.1.*"]) == ["blocks.1.attn", "blocks.1.mlp"]
    assert find_sites(model, ["**.attn"]) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def test_a_star_stays_within_one_component() -> None:
    with pytest.raises(SiteError, match=r"'\*\.attn' matches no module of Stack"):
        find_sites(stack(), ["*.attn"])


def test_one_string_is_not_a_list_of_patterns() -> None:
    with pytest.raises(SiteError, match="a list of globs"):
        find_sites(stack(), "blocks.*.mlp")


def test_nested_sites_are_refused() -> None:
    with pytest.raises(SiteError, match=r"blocks\.0\.attn lies inside site blocks\.0"):
        find_sites(stack(), ["blocks.*", "blocks.*.attn"])


def test_missing_sites_are_named() -> None:
    with pytest.raises(SiteError, match=r"Stack has no module blocks\.7\.attn"):
        check_sites(stack(), ["blocks.0.attn", "blocks.7.attn"])


class Wrapper(nn.Module):
    """A block that is nothing but another block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)


class Listed(nn.Module):
    """A block that lists its sub-layers, each with its norm, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"norm": nn.LayerNorm(8), "attention": nn.Linear(8, 8)})
        feed_forward = nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.Sequential(nn.Linear(8, 8))})
        self.layer = nn.ModuleList([attention, feed_forward])


class Inline(nn.Module):
    """A block that is its own feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.up_proj = nn.Linear(8, 16)
        self.mlp_act = nn.GELU()
        self.down_proj = nn.Linear(16, 8)


class Modulated(nn.Module):
    """A block with an adaLN that is an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.adaln_mlp = nn.Sequential(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("block", "sites"),
    [
        (Wrapper, ["block.attn", "block.mlp"]),
        (Listed, ["layer.0.attention", "layer.1.mlp"]),
        (Inline, ["attention", "down_proj"]),
        (Modulated, ["attn"]),
    ],
)
def test_sites_of_a_block(block: type[nn.Module], sites: list[str]) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
    assert find_sites(model) == [f"blocks.{index}.{site}" for index in range(2) for site in sites]


def test_a_list_without_attention_has_no_sites() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(8, 8)}) for _ in range(2))})
    with pytest.raises(SiteError, match="no sites were found"):
        find_sites(model)
