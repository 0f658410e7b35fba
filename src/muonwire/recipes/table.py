"""The recipes, a line each, in the order of lists: what is imported here is ``recipes.NAME``, and known to `--recipe`."""
# ruff: noqa: I001

from muonwire.recipes.dense import adamw as adamw
from muonwire.recipes.dense import muon as muon
from muonwire.recipes.demo_family import distro as distro
from muonwire.recipes.one_bit import one_bit_muon as one_bit_muon
from muonwire.recipes.local import local_muon as local_muon
from muonwire.recipes.local import local_adamw as local_adamw
from muonwire.recipes.demo_family import demo as demo
from muonwire.recipes.demo_family import psyche as psyche
from muonwire.recipes.local_presets import muloco as muloco
from muonwire.recipes.local_presets import diloco as diloco
from muonwire.recipes.local_presets import sparseloco as sparseloco
from muonwire.recipes.dense import sgd as sgd
from muonwire.recipes.dense import normuon as normuon
from muonwire.recipes.approaches import approach_a as approach_a
from muonwire.recipes.approaches import approach_b as approach_b
from muonwire.recipes.approaches import approach_c as approach_c
from muonwire.recipes.approaches import approach_d as approach_d
from muonwire.recipes.low_rank import approach_e as approach_e
from muonwire.recipes.low_rank import powersgd_muon as powersgd_muon
from muonwire.recipes.approaches import approach_f as approach_f
from muonwire.recipes.approaches import pre_polar as pre_polar
from muonwire.recipes.approaches import distro_weight_polar as distro_weight_polar
from muonwire.recipes.weight_polar import sgd_weight_polar as sgd_weight_polar
from muonwire.recipes.low_rank import dion as dion
from muonwire.recipes.feedback_muon import ef14_muon as ef14_muon
from muonwire.recipes.feedback_muon import ef21_muon as ef21_muon
from muonwire.recipes.feedback_muon import signmuon as signmuon
from muonwire.recipes.fast_variants import muonfast as muonfast
from muonwire.recipes.anderson import gda2 as gda2
