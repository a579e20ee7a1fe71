# The body of stage1, stage2 and ablations.sbatch: `source job.sh SCRIPT.py WORDS...` runs one process per task, and puts the
# job back into the queue until it is done. SIGUSR1 (sent --signal seconds before the time limit) or SIGTERM (preemption)
# makes train.py write a checkpoint and exit with 75; resume=auto then takes the run up at the same sample.
# A task that fails or is killed ends the whole step at once: the others would wait for it in a collective.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[ -d "${VISTALLM_VENV:-.venv}" ] && source "${VISTALLM_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" PYTHONUNBUFFERED=1
export REQUEUE="$PWD/.requeue-$SLURM_JOB_ID" # a file that says it: the code of srun is that of its worst task
rm -f "$REQUEUE"

# 75 is no failure: as one, the first task to leave would have those killed that are still closing down. The signals reach
# every process of the step, this shell too, which has to wait for its Python.
task='trap : USR1 TERM; python "$@"; code=$?; [ "$code" -ne 75 ] || { touch "$REQUEUE"; code=0; }; exit "$code"'
srun --kill-on-bad-exit=1 bash -c "$task" task "$@" &
step=$!
# A signal to this shell interrupts `wait`; the tasks have had it from SLURM, and are waited for again.
trap : USR1 TERM
wait "$step"
while code=$? && kill -0 "$step" 2>/dev/null; do wait "$step"; done
if [ -e "$REQUEUE" ]; then
    rm "$REQUEUE"
    echo "$1 was stopped by a signal and goes back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
