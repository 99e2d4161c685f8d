"""What looks like attention and has no query/key pair: modules [b, t, c] -> [b, t, c] that must never be reported.

In: the width. Out: source text of a class for each name.
"""

from __future__ import annotations

DISTRACTORS = {
    "Router": """
class Router(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, c, 5)), nn.Parameter(torch.randn(3, 5, c))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        hidden = torch.einsum("btc,xcf->btxf", x, self.up).relu()
        return torch.einsum("btx,btxc->btc", weights, torch.einsum("btxf,xfc->btxc", hidden, self.down))
""",
    "TopRouter": """
class TopRouter(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(c, 2), nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x):
        weights, picked = self.gate(x).softmax(-1).topk(2)
        experts = torch.stack((self.a(x), self.b(x)), -2)
        return (experts * weights.unsqueeze(-1)).sum(-2) + 0.0 * picked.sum()
""",
    "LinearAttention": """
class LinearAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        return self.out(q @ (k.transpose(-1, -2) @ self.v(x)) / (q @ k.sum(1, keepdim=True).transpose(-1, -2)))
""",
    "EfficientAttention": """
class EfficientAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, c) for _ in range(3))

    def forward(self, x):
        return self.q(x).softmax(-1) @ (self.k(x).softmax(1).transpose(-1, -2) @ self.v(x))
""",
    "Similarity": """
class Similarity(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(c, 5), nn.Linear(c, 5), nn.Parameter(torch.ones(()))

    def forward(self, x):
        a, b = F.normalize(self.a(x).mean(1), dim=-1), F.normalize(self.b(x).mean(1), dim=-1)
        self.match = (self.scale.exp() * a @ b.T).softmax(-1)
        return x
""",
    "Additive": """
class Additive(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v, self.score = nn.Linear(c, 5), nn.Linear(c, 5), nn.Linear(c, c), nn.Linear(5, 1)

    def forward(self, x):
        score = self.score(torch.tanh(self.q(x).unsqueeze(2) + self.k(x).unsqueeze(1))).squeeze(-1)
        return score.softmax(-1) @ self.v(x)
""",
    "Pooling": """
class Pooling(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.score, self.v = nn.Linear(c, 1), nn.Linear(c, c)

    def forward(self, x):
        return x + (self.score(x).softmax(1) * self.v(x)).sum(1, keepdim=True)
""",
    "SqueezeExcite": """
class SqueezeExcite(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down, self.up = nn.Linear(c, 3), nn.Linear(3, c)

    def forward(self, x):
        return x * self.up(self.down(x.mean(1, keepdim=True)).relu()).sigmoid()
""",
    "Scan": """
class Scan(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.step, self.b, self.c = nn.Linear(c, c), nn.Linear(c, 3), nn.Linear(c, 3)
        self.a = nn.Parameter(torch.randn(c, 3))

    def forward(self, x):
        step, state, outs = F.softplus(self.step(x)), x.new_zeros(x.shape[0], x.shape[2], 3), []
        for i in range(x.shape[1]):
            decay = torch.exp(-step[:, i, :, None] * self.a.exp())
            state = decay * state + step[:, i, :, None] * self.b(x[:, i])[:, None] * x[:, i, :, None]
            outs.append(torch.einsum("bcn,bn->bc", state, self.c(x[:, i])))
        return torch.stack(outs, 1)
""",
    "Gated": """
class Gated(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(c, 7), nn.Linear(c, 7), nn.Linear(7, c)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))
""",
    "Sigmoid": """
class Sigmoid(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, c) for _ in range(3))

    def forward(self, x):
        return torch.sigmoid(self.q(x) @ self.k(x).transpose(-1, -2)) @ self.v(x)
""",
}
"""Source of each class; all take the width."""
