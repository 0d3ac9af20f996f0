#!/bin/sh
# Starts a driver on a running Ray cluster, as a Ray job, and follows its log; Ctrl-C leaves it running.
#
#   RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=token ./submit-job.sh --drain
#
# Options are those of `mergefleet run`. The job is called mergefleet, or SUBMISSION_ID; `ray job stop mergefleet` stops it.
set -eu
submission_id=${SUBMISSION_ID:-mergefleet}

# An ended job keeps its id until it is deleted. One that runs is not: this ends here, and there is never a second driver.
if ray job status "$submission_id" >/dev/null 2>&1; then
    ray job delete "$submission_id"
fi

# A job is killed 3 s after it was asked to stop, unless told otherwise.
exec ray job submit --submission-id "$submission_id" \
    --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "150"}}' \
    -- mergefleet run --address auto "$@"
