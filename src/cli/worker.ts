// The command that the launcher starts, once per rank: `tp-run worker CONTROL-ENDPOINT RUN-ID RANK RANKS`.

import { runRank } from '../engine/rank.js';
import { fail } from '../errors.js';

/** Lives a rank's life; resolves with the exit code. TP_COMMAND when somebody else than the launcher types it. */
export async function runWorker(words: readonly string[]): Promise<number> {
  const [control, run, rank, ranks] = words;
  if (!control || !run || !(Number(rank) < Number(ranks))) {
    throw fail('TP_WORKER_WORDS');
  }
  return runRank({ control, run, rank: Number(rank), ranks: Number(ranks) });
}
