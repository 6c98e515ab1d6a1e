import pytest
import torch

from resight.encoder.backbone import BACKBONES
from resight.encoder.model import Encoder, EncoderConfig, GeM, with_parts
from resight.image import ImageSpec

SMALL = ImageSpec(64, 32)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("embedding_dim", [0, 48])
def test_three_unit_views_of_every_backbone(backbone: str, embedding_dim: int) -> None:
    encoder = Encoder(EncoderConfig(backbone, "gem", embedding_dim, SMALL)).eval()
    with torch.inference_mode():
        views = encoder(torch.randn(2, 3, 64, 32))
    for view in views:
        assert view.shape == (2, encoder.feature_dim)
        assert view.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert encoder.feature_dim == (embedding_dim or encoder.channels)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_total_stride_is_16_so_a_256x128_crop_gives_a_16x8_map(backbone: str) -> None:
    encoder = Encoder(EncoderConfig(backbone)).eval()
    with torch.inference_mode():
        assert encoder.backbone(torch.randn(1, 3, 256, 128)).shape == (1, encoder.channels, 16, 8)


def test_local_views_see_only_their_half_and_ignore_an_odd_row() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig("osnet_x0_25", "avg", 0, ImageSpec(80, 32))).eval()  # map of 5 rows
    features = torch.rand(1, encoder.channels, 5, 2)
    encoder.backbone = torch.nn.Identity()  # type: ignore[assignment]
    before = encoder(features)
    features[:, :, 4] += 1  # the odd row
    after = encoder(features)
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    assert not torch.equal(before[0], after[0])
    features[:, :, 3] += 1
    assert torch.equal(before[1], encoder(features)[1]) and not torch.equal(before[2], encoder(features)[2])


def test_embed_is_the_global_view() -> None:
    encoder = Encoder(EncoderConfig(image=SMALL)).eval()
    images = torch.randn(3, 3, 64, 32)
    with torch.inference_mode():
        assert torch.allclose(encoder.embed(images), encoder(images)[0], atol=1e-6)


def test_gem_equals_its_formula_and_p_1_is_the_mean() -> None:
    maps = torch.rand(2, 4, 3, 2)
    slow = torch.tensor(
        [[sum(max(float(v), 1e-6) ** 3 for v in channel.flatten()) / 6 for channel in crop] for crop in maps]
    )
    assert torch.allclose(GeM()(maps), slow ** (1 / 3), atol=1e-6)
    assert torch.allclose(GeM(1.0)(maps), maps.mean((2, 3)), atol=1e-6)


def test_normalise_uses_imagenet_statistics() -> None:
    encoder = Encoder(EncoderConfig(image=SMALL))
    pixels = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    pixels[..., 1] = 255
    out = encoder.normalise(pixels)[0, :, 0, 0]
    assert out.tolist() == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225], rel=1e-5)


@pytest.mark.parametrize("values", [{"backbone": "vgg"}, {"pooling": "max"}, {"embedding_dim": -1}])
def test_invalid_configs_are_rejected(values: dict) -> None:
    with pytest.raises(ValueError):
        EncoderConfig(**values)


def test_a_config_round_trips_through_json() -> None:
    config = EncoderConfig("resnet18", "gem", 0, ImageSpec(128, 64, "bilinear"))
    assert EncoderConfig.from_json(config.to_json()) == config


def test_joined_stripes_equal_the_global_head_on_them() -> None:
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig("osnet_x0_25", "avg", 32, ImageSpec(128, 64))).eval()
    striped = with_parts(encoder, 4, 0.5)
    assert (striped.config.part_dim, striped.feature_dim) == (8, 64) and encoder.config.parts == 2
    maps = torch.rand(2, encoder.channels, 8, 4)
    with torch.inference_mode():
        whole = encoder.heads["global"](maps)
        joined = torch.cat([striped.heads[f"part{i}"](maps) for i in range(4)], 1)
    assert torch.allclose(whole, joined, atol=1e-5)


def test_joined_views_have_the_weighted_distance_of_the_views() -> None:
    torch.manual_seed(2)
    encoder = with_parts(Encoder(EncoderConfig("osnet_x0_25", "gem", 32, SMALL)).eval(), 4, 0.5)
    images = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        views, joined = encoder(images), encoder.embed(images)
    gaps = [float((view[0] - view[1]).square().sum()) for view in views]
    assert float((joined[0] - joined[1]).square().sum()) == pytest.approx(0.5 * gaps[0] + 0.5 * sum(gaps[1:]) / 4)
    assert joined.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_random_parts_are_deterministic() -> None:
    encoder = Encoder(EncoderConfig("resnet18", "avg", 0, ImageSpec(128, 64))).eval()
    one, other = with_parts(encoder, 8, 0.5), with_parts(encoder, 8, 0.5)
    assert one.config.part_dim == 64 and one.feature_dim == 1024
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert with_parts(encoder, 2, 0.0) is not encoder


def test_more_parts_than_map_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match="8 parts need a height of 128"):
        EncoderConfig(image=SMALL, parts=8)
