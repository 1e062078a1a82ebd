"""What a run's steps found, kept on the device until somebody asks: no step waits for a GPU.

The losses and the gradient are looked at before each step of the optimiser.  From the first one
that is not finite on, no step is applied, and `check` says which it was.
"""

import torch

from support import parallel


class Guard:
    """Watches the steps of an optimiser.

    terms : the names of the losses          begun : the run's step before the first watched one
    stop  : cli.Stop, whose `asked` is shared among the ranks here
    """

    def __init__(self, optimizer, terms, stop, begun=0):
        self.optimizer, self.terms, self.stop, self.begun = optimizer, terms, stop, begun
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.device = self.weights[0].device
        self.values = torch.zeros(len(terms), device=device)  # losses of this step
        self.sums = torch.zeros(len(terms), device=device)  # and since the log's last row
        self.finite = torch.ones(len(terms) + 1, dtype=torch.bool, device=device)
        self.applied = torch.zeros((), dtype=torch.int64, device=device)  # steps
        self.asked = torch.zeros((), device=device)  # above 0 once a rank was asked to stop
        optimizer.register_step_pre_hook(self.before_step)

    def note(self, terms, parts):
        """Adds the terms, {name: scalar}, of one of so many equal parts of the step's batch."""
        self.values += torch.stack([terms[name].detach() for name in self.terms]) / parts

    def before_step(self, *_):
        """Looks at the step's losses and gradient; withholds the step if they are not finite."""
        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        asked = torch.full_like(norm, self.stop.asked)
        found = torch.cat([self.values, torch.stack([norm, asked])])
        found = parallel.add(found) / parallel.size()
        losses, norm, asked = found[:-2], found[-2], found[-1]
        self.finite &= found[:-1].isfinite()
        all_finite = self.finite.all()
        self.optimizer.found_inf = (~all_finite).float()  # the fused AdamW then changes nothing
        self.applied += all_finite
        self.sums += losses
        self.asked += asked
        self.values.zero_()
        if self.device.type == "mps":  # whose fused AdamW may not look at found_inf
            self.check()

    def stopped(self):
        """Whether a rank was asked to stop; waits for the device."""
        return bool(self.asked)

    def check(self):
        """ArithmeticError, naming step and terms, once a loss or gradient was not finite."""
        if self.finite.all():
            return
        finite = zip([*self.terms, "gradient"], self.finite.tolist(), strict=True)
        bad = [name for name, ok in finite if not ok]
        names = [name for name in bad if name not in ("loss", "gradient")] or bad[:1]
        if parallel.rank():
            raise SystemExit(1)  # rank 0 says it
        raise ArithmeticError(
            f"step {self.begun + int(self.applied) + 1}: {', '.join(names)} is not finite; "
            "expected numbers; the step was not applied, and no checkpoint holds it; "
            "try a smaller --lr or --precision fp32"
        )

    def means(self, steps):
        """{term: its mean over the last `steps` steps}, which begin anew."""
        means = dict(zip(self.terms, (self.sums / steps).tolist(), strict=True))
        self.sums.zero_()
        return means
