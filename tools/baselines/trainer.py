"""Training steps in PyTorch, and how long they take on the GPU."""
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoder import Decoder

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WARMUP_STEPS = 10
STEPS_A_REPEAT = 5


def flops(model, shape):
    """Operations of a step: 6 a token and weight of a matrix (the embedding is no product), and 12 a
    pair of query and key, head and dimension. What backward computes again does not count."""
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.embed.weight.numel()
    pairs = shape.tokens * (shape.tokens + 1) / 2
    products = 6 * shape.batch * shape.tokens * weights
    return products + 12 * shape.n_layer * shape.batch * shape.n_head * pairs * shape.head_dim


def adamw(model):
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Trainer:
    """A model, its optimizer and a batch of random tokens; compiled once it is made."""

    def __init__(self, shape, residual, sdpa, mode):
        self.shape, self.settings = shape, {"residual": residual, "sdpa": sdpa, "mode": mode}
        torch.manual_seed(1)
        with torch.device("cuda"):
            model = Decoder(shape, getattr(torch, residual))
            self.batch = torch.randint(shape.vocab, (2, shape.batch, shape.tokens))
        self.model, self.optimizer = model, adamw(model)

        @torch.compile(mode=mode, fullgraph=True, dynamic=False)
        def loss_of(tokens, targets):
            # The backend is named inside: caches of compiled code do not look at it outside.
            with sdpa_kernel(SDPA[sdpa]), torch.autocast("cuda", torch.bfloat16):
                return model(tokens, targets)

        self.loss_of = loss_of
        self.first_loss = self.step().item()  # near log(vocab)

    def step(self):
        loss = self.loss_of(*self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def times(self, repeats):
        """Milliseconds a step, each the mean of STEPS_A_REPEAT."""
        for _ in range(WARMUP_STEPS):
            self.step()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(repeats):
            begin.record()
            for _ in range(STEPS_A_REPEAT):
                self.step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / STEPS_A_REPEAT)
        return times

    def measure(self, repeats):
        torch.cuda.reset_peak_memory_stats()
        times = self.times(repeats)
        step_ms = statistics.median(times)
        free, total = torch.cuda.mem_get_info()
        return self.settings | {
            "tokens_per_second": 1e3 * self.batch[0].numel() / step_ms,
            "step_ms": step_ms,
            "step_ms_repeats": times,
            "tflops": flops(self.model, self.shape) / step_ms / 1e9,
            "peak_memory_bytes": total - free,  # PyTorch keeps what it ever allocated
            "peak_tensor_bytes": torch.cuda.max_memory_allocated(),
            "first_loss": self.first_loss,
        }
