// Starts one rank's process on this host: its words, what it finds around it, its briefing.

import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Exit, RankProcess } from './process.js';
import type { Briefing } from './wire.js';

/** How workers are started here. */
export interface LaunchHooks {
  /** Command line of a worker, before the words that say which one it is. Default: this package's `worker`. */
  worker?: readonly string[];
  /** The environment that workers get, besides the names that tools look for: RANK, WORLD_SIZE. Default: this process's. */
  env?: NodeJS.ProcessEnv;
}

/** Which rank it is, and where it fits in. */
export interface LocalRank {
  control: string;
  run: string;
  rank: number;
  ranks: number;
  /** Its node, its place on it, and how many ranks the node has. */
  node: number;
  localRank: number;
  localRanks: number;
  host: string;
  logDir: string | null;
  briefing: Briefing;
}

const OWN_WORKER = [process.execPath, fileURLToPath(new URL('../cli/main.js', import.meta.url)), 'worker'];

export function startLocalRank(
  who: LocalRank,
  hooks: LaunchHooks,
  onExit: (exit: Exit) => void,
): RankProcess {
  const { control, run, rank, ranks, host, logDir, briefing } = who;
  const command = [...(hooks.worker ?? OWN_WORKER), control, run, String(rank), String(ranks)];
  const surroundings = {
    prefix: `${host}:${rank} `,
    logFile: logDir && join(logDir, `rank-${rank}.log`),
    env: hooks.env && { ...hooks.env, ...torchNames(who) },
    input: JSON.stringify(briefing),
  };
  return new RankProcess(command, surroundings, onExit);
}

/** What torchrun calls them: debuggers, profilers and NCCL tools look for these. */
function torchNames({ rank, ranks, node, localRank, localRanks }: LocalRank): Record<string, string> {
  return {
    RANK: String(rank),
    WORLD_SIZE: String(ranks),
    LOCAL_RANK: String(localRank),
    LOCAL_WORLD_SIZE: String(localRanks),
    GROUP_RANK: String(node),
  };
}
