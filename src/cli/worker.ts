// The command that the launcher starts, once per rank: `tp-run worker CONTROL-ENDPOINT RUN-ID RANK RANKS`, with a
// briefing on stdin.

import { readFileSync } from 'node:fs';
import { fail } from '../errors.js';
import { native } from '../native.js';

const STDIN = 0;
/** The pipe whose other end the launcher holds: it closes when the launcher is gone. */
const DEATH_PIPE = 3;

/** Lives a rank's life; resolves with the exit code. TP_WORKER_WORDS when somebody else than the launcher types it. */
export async function runWorker(words: readonly string[]): Promise<number> {
  const [control, run, rank, ranks] = words;
  if (!control || !run || !(Number(rank) < Number(ranks))) throw fail('TP_WORKER_WORDS');
  watchLauncher();
  const { runRank } = await import('../engine/rank.js');
  const { parseBriefing } = await import('../engine/wire.js');
  const briefing = parseBriefing(readFileSync(STDIN, 'utf8'));
  return runRank({ control, run, rank: Number(rank), ranks: Number(ranks), briefing });
}

/** Before anything else, even the imports: from here on this process dies with its launcher. */
function watchLauncher(): void {
  try {
    native().watchParent(DEATH_PIPE);
  } catch {
    // an addon that does not load is told over the control channel, by the rank's stage of that name
  }
}
