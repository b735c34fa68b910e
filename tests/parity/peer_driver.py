"""Run every case with zennit-crp 0.6.0 and save the results; a process of its own, see `conftest.peer`.

Usage: ``python -I peer_driver.py <folder of the peer> <output folder>``. ``-I`` keeps the working directory and
``PYTHONPATH`` out, so that ``crp`` can only be the peer; this is checked.

zennit-crp declares torch < 2, zennit <= 0.4.6 and numpy <= 1.23.5. Under current libraries it needs one shim here:
``np.int``, which `load_stat_targets` uses and numpy 1.24 removed. (Its pictures also fail, as zennit's palettes do not
suit Pillow 13; no case draws any.)
"""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

CASE_MODULES = ("parity_cases", "parity_generation", "parity_mining", "parity_defects", "parity_mining_defects")


def main(peer_folder: str, out_folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, peer_folder)
    np.int = int  # noqa: NPY001
    warnings.simplefilter("ignore")

    import crp.attribution

    loaded_from = Path(crp.attribution.__file__).resolve()
    if Path(peer_folder).resolve() not in loaded_from.parents:
        raise SystemExit(f"crp was imported from {loaded_from}, not from the peer's folder {peer_folder}")

    modules = {name: importlib.import_module(name) for name in CASE_MODULES}
    gc.freeze()  # the peer collects garbage for every table it saves: 0.2 s each over all that torch has loaded
    for module_name, module in modules.items():
        results = {}
        for name, case in module.CASES.items():
            try:
                results |= {f"{name}/{key}": value for key, value in case.compute().items()}
            except Exception:
                results[f"{name}/error"] = np.array(traceback.format_exc())
        np.savez(Path(out_folder) / f"{module_name}.npz", **results)
    gc.unfreeze()


if __name__ == "__main__":
    main(*sys.argv[1:])
