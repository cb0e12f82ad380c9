// The command that the launcher starts, once per rank: `tp-run worker CONTROL-ENDPOINT RUN-ID RANK RANKS`.

import { fail } from '../errors.js';
import { native } from '../native.js';

/** The pipe whose other end the launcher holds: it closes when the launcher is gone. */
const DEATH_PIPE = 3;

/** Lives a rank's life; resolves with the exit code. TP_WORKER_WORDS when somebody else than the launcher types it. */
export async function runWorker(words: readonly string[]): Promise<number> {
  const [control, run, rank, ranks] = words;
  if (!control || !run || !(Number(rank) < Number(ranks))) throw fail('TP_WORKER_WORDS');
  watchLauncher();
  const { runRank } = await import('../engine/rank.js');
  return runRank({ control, run, rank: Number(rank), ranks: Number(ranks) });
}

/** Before anything else, even the imports: from here on this process dies with its launcher. */
function watchLauncher(): void {
  try {
    native().watchParent(DEATH_PIPE);
  } catch {
    // an addon that does not load is told over the control channel, by the rank's stage of that name
  }
}
