r"""Writes PAPER.md: each equation and figure of the paper, its code, and a test that holds it.

    python -m experiments.paper_page

The formulas stand below; the sources are read from the code, so that the page cannot differ from
it.  A test compares the page with what this program would write.
"""

import importlib
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

from support import cli
from support.files import atomic

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """One equation or figure of the paper."""

    name: str  # as the paper counts it
    what: str
    formula: str  # TeX, or plain lines for a figure
    code: str  # module.function, or module.Class.method
    test: str  # a test that fails where the code is wrong


ROWS = (
    Row(
        "Eq. 1",
        "one step to noise",
        r"q(x_t \mid x_{t-1}) = \mathcal{N}\left(\sqrt{1-\beta_t}\,x_{t-1},\ \beta_t I\right)",
        "diffusion.q_step",
        "test_eq01_chain_of_steps_has_the_moments_of_eq02",
    ),
    Row(
        "Eq. 2",
        "the noisy image given the clean one",
        r"q(x_t \mid x_0) = \mathcal{N}\left(\sqrt{\bar\alpha_t}\,x_0,\ (1-\bar\alpha_t) I\right)",
        "diffusion.q_sample",
        "test_eq02_q_sample_scales_signal_and_noise_by_the_roots",
    ),
    Row(
        "Eq. 3",
        "a draw of it",
        r"x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon",
        "diffusion.q_sample",
        "test_eq03_x_t_is_the_closed_form_of_a_schedule_built_here",
    ),
    Row(
        "Eq. 4",
        "one step back",
        r"p_\theta(x_{t-1} \mid x_t)"
        r" = \mathcal{N}\left(\mu_\theta(x_t, t),\ \Sigma_\theta(x_t, t)\right)",
        "diffusion.p_sample",
        "test_eq04_a_step_back_has_the_mean_and_the_variance_it_was_given",
    ),
    Row(
        "Eq. 5",
        "the term of the bound",
        r"L_t = \mathrm{KL}\left(q(x_{t-1} \mid x_t, x_0)\ \|\ p_\theta(x_{t-1} \mid x_t)\right)",
        "diffusion.gaussian_kl",
        "test_eq05_is_the_divergence_of_two_gaussians",
    ),
    Row(
        "Eq. 6",
        "the same in means; the printed factor $1/2\\beta_t^2$ is an erratum",
        r"L_t = \frac{1}{2\beta_t}"
        r"\left\| \tilde\mu_t(x_t, x_0) - \mu_\theta(x_t, t) \right\|^2",
        "losses.mu_loss",
        "test_eq06_l_mu_is_the_divergence_of_eq05_times_two_beta",
    ),
    Row(
        "Eq. 7",
        "the mean of the posterior",
        r"\tilde\mu_t(x_t, x_0) = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0"
        r" + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t",
        "diffusion.mu_from_x0",
        "test_eq07_mean_and_variance_are_bayes_rule_on_a_grid",
    ),
    Row(
        "Eq. 8",
        "the clean image that the noise implies",
        r"x_0^* = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon'}{\sqrt{\bar\alpha_t}}",
        "diffusion.x0_from_eps",
        "test_eq08_x0_star_inverts_forward",
    ),
    Row(
        "Eq. 9",
        "the mean from the noise",
        r"\mu_{\epsilon'}(x_t, t) = \frac{1}{\sqrt{\alpha_t}}\,x_t"
        r" - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}\,\sqrt{\alpha_t}}\,\epsilon'",
        "diffusion.mu_from_eps",
        "test_eq09_is_eq07_at_x0_star",
    ),
    Row(
        "Eq. 10",
        "the mean from the clean image: Eq. 7 at $x_0'$",
        r"\mu_{x_0'}(x_t, t) = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0'"
        r" + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t",
        "diffusion.mu_from_x0",
        "test_eq10_is_its_printed_form",
    ),
    Row(
        "Eq. 11",
        "the mixed mean",
        r"\mu_{\theta,\phi} = r_t\,\mu_{x_0'} + (1-r_t)\,\mu_{\epsilon'}",
        "diffusion.mix",
        "test_eq11_mixing_means_is_mixing_clean_images",
    ),
    Row(
        "Eq. 12, L_eps",
        "theta's loss",
        r"L_\epsilon = \left\| \epsilon - \epsilon' \right\|^2",
        "losses.eps_loss",
        "test_eq12_eps_and_x0_losses_are_means_of_squares_over_an_image",
    ),
    Row(
        "Eq. 12, L_x0",
        "phi's loss",
        r"L_{x_0} = \left\| x_0 - x_0' \right\|^2",
        "losses.x0_loss",
        "test_eq12_eps_and_x0_losses_are_means_of_squares_over_an_image",
    ),
    Row(
        "Eq. 12, L_mu",
        "the loss of r_t alone",
        r"L_\mu = \left\| \tilde\mu_t - \left( r_t\,[\mu_{x_0'}]_{sg}"
        r" + (1-r_t)\,[\mu_{\epsilon'}]_{sg} \right) \right\|^2",
        "losses.mu_loss",
        "test_eq12_mu_loss_is_least_at_the_closed_form_gate",
    ),
    Row(
        "Eq. 13",
        "the metric",
        r"L_{lpips} = \mathrm{LPIPS}\left(T(x_0),\ T(x_0')\right)",
        "metrics.LPIPS.distance",
        "test_eq13_lpips_is_piqs_on_T_of_the_images",
    ),
    Row(
        "Eq. 13, T",
        "what the metric sees: 224 x 224, in [0, 1]",
        r"T : [-1, 1]^{H \times W} \to [0, 1]^{224 \times 224}",
        "metrics.T",
        "test_eq13_T_resizes_to_224_and_to_the_unit_range",
    ),
    Row(
        "Eqs. 14, 15",
        "what theta and phi minimise",
        r"L_\theta = \lambda_\epsilon L_\epsilon, \qquad"
        r" L_\phi = \lambda_{x_0} L_{x_0} + \lambda_\mu L_\mu + \lambda_{lpips} L_{lpips}",
        "losses.objective",
        "test_eq14_eq15_each_term_has_its_lambda",
    ),
    Row(
        "Eq. 16",
        "DDIM's mean from the clean image",
        r"\mu_{x_0'}^{ddim} = \sqrt{\bar\alpha_{t-1}}\,x_0' + \sqrt{1-\bar\alpha_{t-1}-\sigma_t^2}"
        r"\ \frac{x_t - \sqrt{\bar\alpha_t}\,x_0'}{\sqrt{1-\bar\alpha_t}}",
        "diffusion.ddim_mu_from_x0",
        "test_eq16_keeps_the_marginal_of_eq02",
    ),
    Row(
        "Eq. 17",
        "DDIM's mean from the noise",
        r"\mu_{\epsilon'}^{ddim} = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon'}{\sqrt{\alpha_t}}"
        r" + \sqrt{1-\bar\alpha_{t-1}-\sigma_t^2}\ \epsilon'",
        "diffusion.ddim_mu_from_eps",
        "test_eq17_is_eq16_at_x0_star",
    ),
    Row(
        "after Eq. 17",
        "the DDIM step of the mix",
        r"\mu^{ddim} = r_t\,\mu_{x_0'}^{ddim} + (1-r_t)\,\mu_{\epsilon'}^{ddim}",
        "sample.Ddim.__call__",
        "test_eq16_17_step_is_one_ddim_step_at_the_mixed_clean_image",
    ),
    Row(
        "Figure 1",
        "the cascade; DDPM and Dual Diffusion stand beside it in refiner.py",
        r"x_t \to \theta \to \epsilon' \to \text{Eq. 8} \to x_0^* \to \phi \to x_0',\ r_t",
        "refiner.CasDM.forward",
        "test_casdm_is_theta_then_eq08_then_phi",
    ),
    Row(
        "Figure 2",
        "from noise to images",
        r"x_T \to x_{T-1} \to \dots \to x_0",
        "sample.sample",
        "test_each_step_is_ddims_of_the_clamped_estimates",
    ),
    Row(
        "Figure 3",
        "training: what reaches theta, and what reaches phi",
        r"L_\theta \to \theta, \qquad L_\phi \to \phi",
        "train.train",
        "test_a_step_of_training_is_the_pages",
    ),
)


def page():
    """The text of PAPER.md."""
    lines = [
        "# The paper and its code, side by side",
        "",
        "*Bring Metric Functions into Diffusion Models*"
        " ([arXiv:2401.02414v1](https://arxiv.org/abs/2401.02414v1)).",
        "For each equation and figure: the formula, the function that is it, and a test that fails"
        " where the function is wrong.",
        "`python -m experiments.paper_page` writes this page from the code;"
        " [the whole method on one page](tests/test_paper_in_one_page.py) is a test, too.",
        "",
    ]
    for row in ROWS:
        lines += section(row)
    return "\n".join(lines)


def section(row):
    """The lines of one equation."""
    module = row.code.split(".")[0]
    source, first = inspect.getsourcelines(find_code(row.code))
    test, line = find_test(row.test)
    return [
        f"## {row.name}: {row.what}",
        "",
        "```math",
        row.formula,
        "```",
        "",
        f"[{row.code}]({module}.py#L{first}), held by [{row.test}]({test}#L{line})",
        "",
        "```python",
        dedented(source),
        "```",
        "",
    ]


def find_code(name):
    """The function or class called module.function, module.Class or module.Class.method."""
    module, *path = name.split(".")
    found = importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    return inspect.unwrap(found)


def dedented(source):
    """The lines of a source as one text, without the first one's indent."""
    indent = len(source[0]) - len(source[0].lstrip())
    return "".join(line[indent:] if line.strip() else line for line in source).rstrip()


def find_test(name):
    """(path, line) of the test, from the root."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.startswith(f"def {name}("):
                return path.relative_to(ROOT).as_posix(), number
    raise ValueError(
        f"no test is called {name}; expected one in tests/; mend experiments/paper_page.py"
    )


def main(argv=None):
    """Writes PAPER.md."""
    cli.Parser(__doc__).parse_args(argv)
    with atomic(ROOT / "PAPER.md") as f:
        f.write(page().encode())
    print(f"{ROOT / 'PAPER.md'} written")


if __name__ == "__main__":
    sys.exit(cli.run(main))
