"""Run folders: their contents, read and written so that a killed process leaves them intact."""

from diffussm_cli.config import RUNS, bundled_names
from diffussm_cli.runs.checkpoints import damage, has_final, newest_good, remove, whole_folder
from diffussm_cli.runs.folder import locked_folder, resumed_config, run_folder
from diffussm_cli.runs.hub import is_elsewhere
from diffussm_cli.runs.initial import InitialWeights, initial_weights
from diffussm_cli.runs.layout import (
    BEFORE_CHECKPOINTS,
    BEST,
    BOARD,
    CHECKPOINTS,
    CONFIG,
    EMA,
    FILES_TO_SAMPLE,
    FINAL,
    LOG,
    METRICS,
    MODEL,
    NEAREST,
    NEAREST_FACTS,
    OPTIMIZER,
    REPORT,
    RESULTS,
    SAMPLES,
    SKIPPED,
    SNAPSHOTS,
    STATE,
    TEACHER,
    checkpoint_name,
    ema_file,
    list_checkpoints,
    list_snapshots,
    newest_run,
    step_of,
    width_file,
)
from diffussm_cli.runs.metadata import (
    check_config,
    read_config,
    read_data,
    read_metrics,
    read_skipped,
    read_state,
    write_config,
    write_data,
    write_skipped,
    write_state,
)
from diffussm_cli.runs.publish import files_to_publish, model_card, pipeline_files
from diffussm_cli.runs.trained import TrainedRun, find_run, load_model, named_by
from diffussm_cli.runs.weights import (
    check_weights_match,
    read_tensors,
    write_tensors,
    write_weights,
)
