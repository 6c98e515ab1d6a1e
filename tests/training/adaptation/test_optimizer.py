import pytest
import torch

from resight.encoder.model import Encoder, EncoderConfig
from resight.image import ImageSpec
from resight.training.adaptation.checkpoints import pack_optimizer, unpack_optimizer
from resight.training.adaptation.recipe import Recipe
from resight.training.adaptation.run import learning_rate, make_optimizer, set_learning_rate

LP = Recipe("lp", epochs=50, lr_steps=(0.4, 0.8), lr=3.5e-4)


@pytest.mark.parametrize(
    "round_, expected", [(0, 3.5e-4), (19, 3.5e-4), (20, 3.5e-5), (39, 3.5e-5), (40, 3.5e-6), (50, 3.5e-6)]
)
def test_lp_table_of_rates(round_: int, expected: float) -> None:
    # A student's epoch -1 is round 0 here: 3.5e-4 for -1..18, 3.5e-5 for 19..38, 3.5e-6 for 39..49.
    assert learning_rate(LP, round_) == pytest.approx(expected)


O2CAP = Recipe("o2cap", epochs=50, lr_steps=(0.4, 0.8), lr=3.5e-4, warmup=10)


@pytest.mark.parametrize(
    "epoch, expected",
    [(0, 3.5e-6), (1, 3.8e-5), (5, 1.77e-4), (9, 3.15e-4), (10, 3.5e-4), (19, 3.5e-4), (20, 3.5e-5), (40, 3.5e-6)],
)
def test_o2cap_table_of_rates(epoch: int, expected: float) -> None:
    assert learning_rate(O2CAP, epoch) == pytest.approx(expected, rel=0.01)


def train(encoder: Encoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
    encoder.train()
    for step in steps:
        images = torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        encoder(images)[0].square()[:, :7].sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_packed_state_continues_exactly(kind: str, layout: torch.memory_format) -> None:
    recipe = Recipe("mine", optimizer=kind)  # type: ignore[arg-type]
    torch.manual_seed(0)
    whole = Encoder(EncoderConfig(embedding_dim=32, image=ImageSpec(64, 32))).to(memory_format=layout)
    optimizer = make_optimizer(whole, recipe)
    train(whole, optimizer, range(2))
    resumed = Encoder(whole.config).to(memory_format=layout)
    resumed.load_state_dict(whole.state_dict())
    second = make_optimizer(resumed, recipe)
    unpack_optimizer(second, {name: tensor.contiguous().clone() for name, tensor in pack_optimizer(optimizer).items()})
    for encoder, its_optimizer in ((whole, optimizer), (resumed, second)):
        set_learning_rate(its_optimizer, LP, 30)
        train(encoder, its_optimizer, range(2, 4))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_neck_biases_are_not_trained() -> None:
    encoder = Encoder(EncoderConfig(embedding_dim=32, image=ImageSpec(64, 32)))
    trained = {id(parameter) for group in make_optimizer(encoder, LP).param_groups for parameter in group["params"]}
    assert not any(id(head.neck.bias) in trained for head in encoder.heads.values())
