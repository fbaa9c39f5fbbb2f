"""Plans of a fine-tuning run on devices that nobody has rented yet. A tool behind the library, like the CLI."""

from lojax.planner.collectives import traffic
from lojax.planner.gpu_plan import cost_on_gpu, plan_gpus
from lojax.planner.plan import plan, search

__all__ = ["cost_on_gpu", "plan", "plan_gpus", "search", "traffic"]
