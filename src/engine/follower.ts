// A node that is not node 0: joins it, starts ranks when told, says how they end, and ends with it.

import { newRunId, Rendezvous } from '../comm/bootstrap.js';
import type { ClientKeys } from '../comm/curve.js';
import type { LeaderMessage } from '../comm/node-messages.js';
import { NodeClient } from '../comm/nodes.js';
import { fail, type TpError } from '../errors.js';
import { log } from '../log.js';
import { CLOSED, HEARTBEAT_MS, silence } from './cluster.js';
import { type ModelSource, nameOf } from './job.js';
import { type LaunchHooks, startLocalRank } from './local.js';
import type { NodeFacts } from './membership.js';
import { endAll, type RankProcess } from './process.js';
import { newEntry, register } from './registry.js';
import { onEndSignal } from './signals.js';

/** Between SIGTERM and SIGKILL, in ms. */
const GRACE_MS = 300;
/** Node 0's connection has closed: it may be a moment before its process says bye otherwise, or never. */
const GONE_MS = 1000;

export interface FollowerPlace {
  node: number;
  nodes: number;
  endpoint: string;
  /** Address of this host that ranks bind their sockets to; null = one host, over ipc. */
  address: string | null;
  keys: ClientKeys | null;
  /** What a control endpoint of node 0 must look like. */
  controls: RegExp;
  model: ModelSource;
  logDir: string | null;
  initTimeoutMs: number;
  nodeTimeoutMs: number;
}

/**
 * Serves node 0 until it says bye; resolves with the exit code that it gave. TP_MASTER_SILENT, TP_NODE_REFUSED,
 * TP_NODE_LOST, TP_INTERRUPTED; no rank is left then.
 */
export async function follow(place: FollowerPlace, facts: NodeFacts, hooks: LaunchHooks): Promise<number> {
  const follower = new Follower(place, facts, hooks);
  return follower.live();
}

class Follower {
  readonly #place: FollowerPlace;
  readonly #facts: NodeFacts;
  readonly #hooks: LaunchHooks;
  readonly #client: NodeClient;
  /** Ranks of the latest launch, by rank. */
  #ranks = new Map<number, RankProcess>();
  #launch = '';
  /** Where `tp-run ps` finds this node. */
  readonly #folder = new Rendezvous();
  #welcomed = false;
  #heardAt = performance.now();
  #lookedAt = performance.now();
  #goneAt: number | null = null;
  #fail!: (error: TpError) => void;
  readonly #failed = new Promise<never>((_, reject) => {
    this.#fail = reject;
  });

  constructor(place: FollowerPlace, facts: NodeFacts, hooks: LaunchHooks) {
    this.#place = place;
    this.#facts = facts;
    this.#hooks = hooks;
    this.#failed.catch(() => {});
    const { endpoint, node, keys } = place;
    this.#client = new NodeClient(endpoint, node, keys, () => {
      this.#goneAt = performance.now();
    });
  }

  async live(): Promise<number> {
    const releaseSignals = onEndSignal((signal) => this.#fail(fail('TP_INTERRUPTED', signal)));
    const killAll = () => this.#each((rank) => rank.kill('SIGKILL'));
    process.once('exit', killAll);
    const timer = setInterval(() => this.#look(), HEARTBEAT_MS);
    try {
      const { node, nodes } = this.#place;
      this.#register(newRunId(), this.#facts.ranks); // the run's own id comes with its start
      this.#say({ type: 'hello', node, nodes, ...this.#facts });
      const exitCode = await Promise.race([this.#serve(), this.#failed]);
      await this.#endAll();
      this.#say({ type: 'leaving', why: 'told to' });
      return exitCode;
    } catch (error) {
      this.#say({ type: 'leaving', why: (error as Error).message });
      throw error;
    } finally {
      clearInterval(timer);
      await this.#endAll();
      releaseSignals();
      process.off('exit', killAll);
      this.#client.close();
      this.#folder.remove();
    }
  }

  async #serve(): Promise<number> {
    for (;;) {
      const message = await this.#client.receive();
      this.#heardAt = performance.now();
      this.#goneAt = null;
      if (message.type === 'bye') return message.exitCode;
      this.#hear(message);
    }
  }

  #hear(message: LeaderMessage): void {
    const { node, nodes, endpoint } = this.#place;
    switch (message.type) {
      case 'welcome':
        this.#welcomed = true;
        log.info(`node ${node} of ${nodes}: joined node 0 at ${endpoint}`);
        return;
      case 'refused':
        throw fail('TP_NODE_REFUSED', node, message.why);
      case 'start':
        this.#start(message);
        return;
      case 'kill':
        if (message.launch === this.#launch) this.#ranks.get(message.rank)?.kill(message.signal);
        return;
      case 'heartbeat':
      case 'bye':
        return;
    }
  }

  #start(message: LeaderMessage & { type: 'start' }): void {
    const { control, launch, first, ranks, keys } = message;
    const { node, model, address, controls, logDir } = this.#place;
    const localRanks = Math.min(this.#facts.ranks, ranks - first);
    // node 0 is trusted with this host's devices, not with its files
    if (!controls.test(control)) throw fail('TP_MESSAGE_BAD', 'node 0', `control endpoint ${control}`);
    this.#each((rank) => rank.kill('SIGKILL'));
    this.#ranks = new Map();
    this.#launch = launch;
    for (let localRank = 0; localRank < localRanks; localRank++) {
      const rank = first + localRank;
      const own = keys?.own[localRank];
      const briefing = {
        model,
        address,
        keys: own ? { own, launcher: keys.launcher, ranks: keys.ranks } : null,
      };
      const { host } = this.#facts;
      const who = { control, run: launch, rank, ranks, node, localRank, localRanks, host, logDir, briefing };
      const started = startLocalRank(who, this.#hooks, () => {});
      void started.closed.then(() => this.#tellExit(launch, rank, started));
      this.#ranks.set(rank, started);
      if (started.pid !== undefined) this.#say({ type: 'started', launch, rank, pid: started.pid });
    }
    this.#register(launch, ranks);
  }

  /** Makes this node known to `tp-run ps`. */
  #register(run: string, ranks: number): void {
    const { node, nodes, model } = this.#place;
    const about = { run, node, nodes, ranks, device: this.#facts.device, model: nameOf(model) };
    const pids = [...this.#ranks].map(([rank, { pid }]) => [rank, pid] as const);
    register(this.#folder.dir, newEntry(about, pids));
  }

  #tellExit(launch: string, rank: number, { exit, tail }: RankProcess): void {
    const { code, signal } = exit ?? { code: 127, signal: null };
    this.#say({ type: 'exit', launch, rank, code, signal, tail: [...tail] });
  }

  #look(): void {
    const { node, endpoint, initTimeoutMs, nodeTimeoutMs } = this.#place;
    const now = performance.now();
    const asleep = now - this.#lookedAt > 4 * HEARTBEAT_MS;
    this.#lookedAt = now;
    if (!this.#welcomed) {
      if (now - this.#heardAt > initTimeoutMs)
        this.#fail(fail('TP_MASTER_SILENT', node, endpoint, initTimeoutMs, this.#client.refusals));
      return;
    }
    // this process was held up: it cannot say who was silent meanwhile
    if (asleep) this.#heardAt = now;
    const silent = now - this.#heardAt;
    const lost = silent > nodeTimeoutMs;
    // a closed connection is silent as well: what is known says more than what is missing
    if (this.#goneAt !== null && (lost || now - this.#goneAt > GONE_MS))
      this.#fail(fail('TP_NODE_LOST', 'node 0', CLOSED));
    else if (lost) this.#fail(fail('TP_NODE_LOST', 'node 0', silence(silent)));
    this.#say({ type: 'heartbeat' });
  }

  #endAll(): Promise<void> {
    return endAll([...this.#ranks.values()], 0, GRACE_MS);
  }

  #each(act: (rank: RankProcess) => void): void {
    for (const rank of this.#ranks.values()) act(rank);
  }

  #say(message: Parameters<NodeClient['send']>[0]): void {
    this.#client.send(message).catch(() => {}); // a leader that is gone is found out by its silence
  }
}
