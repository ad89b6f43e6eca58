"""
An LSTM that forecasts, with fewer hidden units
===============================================

A hidden unit of an LSTM is four rows of its input and recurrent weights, their biases, a column of the recurrent
weights, and a column of each layer that reads it. They are pruned as one, and removed: the cell that is left is a plain
``nn.LSTM`` of another size, with the same forecasts.
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_sparse import Sparsity
from pl_sparse.export import shrink

# %%
# Waves of a year and of a week, with noise: the network sees 48 values and forecasts the next one.


def series(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    time = torch.randint(2000, (count, 1), generator=generator) + torch.arange(49)
    clean = torch.sin(time * 2 * torch.pi / 365) + 0.5 * torch.sin(time * 2 * torch.pi / 7)
    x = clean + 0.05 * torch.randn(clean.shape, generator=generator)
    return TensorDataset(x[:, :-1, None], clean[:, -1:])


class Net(nn.Module):
    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, hidden, num_layers=2, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Forecast(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.example_input_array = torch.randn(2, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


@torch.no_grad()
def error(net: nn.Module) -> float:
    """The root of the mean squared error."""
    x, y = series(500, seed=1).tensors
    return float((net.eval()(x) - y).square().mean().sqrt())


# %%
# Train, with half of the units pruned on the way.

seed_everything(0, verbose=False)
module = Forecast()
sparsity = Sparsity(structure="coupled", allocation="uniform", sparsity=0.5, report=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_epochs=8, accelerator="cpu", callbacks=[sparsity], **quiet)
trainer.fit(module, DataLoader(series(2000, seed=0), 50, shuffle=True))

# %%
# Remove the units.

net = module.net
masked = error(net)
x, y = series(500, seed=1).tensors
naive = float((x[:, -1] - y).square().mean().sqrt())
result = shrink(net, module.example_input_array)
smaller = error(net)
sizes = [(weight.shape[0] // 4, weight.shape[1]) for weight in (net.lstm.weight_ih_l0, net.lstm.weight_ih_l1)]
print(f"hidden units by layer: {sizes[0][0]}, {sizes[1][0]} of 48; parameters {result.before:,} -> {result.after:,}")
print(f"error {masked:.4f} with masks, {smaller:.4f} without the units; the last value again: {naive:.4f}")
for layer, reason in result.left.items():
    print(f"{layer} stays: {reason}")

# %%
# The forecasts of the smaller network.

with torch.no_grad():
    forecasts = net.eval()(x)
figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.scatter(y, forecasts, s=6)
axes.plot([-1.5, 1.5], [-1.5, 1.5], color="grey", lw=1)
axes.set(xlabel="next value", ylabel="forecast")
figure.suptitle("Forecasts by 24 units per layer", size="medium")
