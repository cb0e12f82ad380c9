// The nodes of a run as node 0 sees them: who is there, which ranks live where, and whether they still are.

import { newRunKeys, type RunKeys, type ServerKeys } from '../comm/curve.js';
import type { NodeAbout } from '../comm/node-messages.js';
import { type FromNode, NodeServer } from '../comm/nodes.js';
import { fail } from '../errors.js';
import { log } from '../log.js';
import { type Member, Membership, type NodeFacts } from './membership.js';
import { within } from './process.js';
import { RemoteRank } from './remote.js';

/** Between two heartbeats, in ms. */
export const HEARTBEAT_MS = 500;

/** How a node is lost, in the words of TP_NODE_LOST. */
export const CLOSED = 'its connection closed: the process was killed, or its host is down';
export const silence = (ms: number): string =>
  `nothing heard for ${Math.round(ms)} ms: its host, or the network to it, is down`;

/** A node that was told to end has this long to end its ranks and say so. */
const BYE_MS = 2000;

export interface ClusterPlace {
  nodes: number;
  /** Where the nodes meet. */
  endpoint: string;
  /** Address of this host that runs bind their sockets to; null = the nodes are processes of one host, over ipc. */
  address: string | null;
  /** Keys of the meeting; null = plain. */
  keys: ServerKeys | null;
  initTimeoutMs: number;
  /** A node that says nothing for so long is lost. */
  nodeTimeoutMs: number;
}

export class Cluster {
  readonly place: ClusterPlace;
  readonly members: Membership;
  readonly #server: NodeServer;
  /** Ranks elsewhere of the run that is on, by rank. */
  readonly #ranks = new Map<number, { node: number; launch: string; process: RemoteRank }>();
  /** Nodes that were refused and have not said that they leave. */
  readonly #refused = new Set<number>();
  readonly #timer: NodeJS.Timeout;
  #lookedAt = performance.now();
  #onPresent: (() => void) | null = null;
  #onLeft: (() => void) | null = null;
  #broken: ((error: Error) => void) | null = null;
  /** Told when a node is lost that has ranks of the run. */
  onLost: (error: Error, ranks: readonly number[]) => void = () => {};

  private constructor(place: ClusterPlace, server: NodeServer, facts: NodeFacts) {
    this.place = place;
    this.#server = server;
    this.members = new Membership(place.nodes, facts);
    this.#timer = setInterval(() => this.#look(), HEARTBEAT_MS);
    this.#timer.unref();
    this.#listen().catch((error: Error) => log.error(`node 0 hears nobody any more: ${error.message}`));
  }

  /** Begins to listen; `allPresent` waits for the nodes. TP_MASTER_BIND. */
  static async listen(place: ClusterPlace, session: string, facts: NodeFacts): Promise<Cluster> {
    return new Cluster(place, await NodeServer.bind(place.endpoint, session, place.nodes, place.keys), facts);
  }

  /** Resolves when every node is there. TP_NODE_MISSING, TP_NODE_MISMATCH; TP_INTERNAL when it is closed meanwhile. */
  async allPresent(): Promise<void> {
    const { endpoint, initTimeoutMs } = this.place;
    const there = new Promise<void>((resolve, reject) => {
      this.#onPresent = () => {
        if (this.members.missing.length === 0) resolve();
      };
      this.#broken = reject;
      this.#onPresent();
    });
    // an awaited promise alone does not keep a process alive, and the timer of `within` does
    const inTime = await within(there, initTimeoutMs).finally(() => {
      this.#onPresent = null;
      this.#broken = null;
    });
    if (!inTime) throw fail('TP_NODE_MISSING', this.members.missing, endpoint, initTimeoutMs);
  }

  /** Keys for one run; null when the cluster uses none. */
  newKeys(ranks: number): RunKeys | null {
    return this.place.keys === null ? null : newRunKeys(ranks);
  }

  /** Starts the ranks that do not live on node 0; by rank. */
  start(
    run: { launch: string; control: string; ranks: number; keys: RunKeys | null },
    onExit: (rank: number) => void,
  ): Map<number, RemoteRank> {
    this.#ranks.clear();
    const { launch, control, ranks, keys } = run;
    for (let rank = this.members.ownRanks(ranks); rank < ranks; rank++) {
      const { node } = this.members.of(rank);
      const kill = (signal: NodeJS.Signals) =>
        this.#tell(node, { type: 'kill', launch, rank, signal: signal as 'SIGTERM' });
      this.#ranks.set(rank, { node, launch, process: new RemoteRank(kill, () => onExit(rank)) });
    }
    for (const { node, ranks: room } of this.members.others) {
      const first = this.members.firstRank(node);
      const own = keys?.ranks.slice(first, first + room);
      if (first >= ranks) continue;
      this.#tell(node, {
        type: 'start',
        launch,
        control,
        first,
        ranks,
        keys: keys && {
          launcher: keys.launcher.publicKey,
          ranks: keys.ranks.map(({ publicKey }) => publicKey),
          own: own!,
        },
      });
    }
    // a node that has gone since all were present
    for (const node of this.members.others) if (!node.present) this.#loseRanks(node, 'it has left');
    return new Map([...this.#ranks].map(([rank, { process }]) => [rank, process]));
  }

  /**
   * Tells every node to end with `exitCode` and waits until they have, for a moment; so for those that were refused: a
   * client of libzmq with `immediate` throws away what it has not read when the connection closes.
   */
  async close(exitCode: number): Promise<void> {
    clearInterval(this.#timer);
    this.#broken?.(fail('TP_INTERNAL', 'the run is over'));
    this.onLost = () => {};
    for (const { node, present } of this.members.others)
      if (present) this.#tell(node, { type: 'bye', exitCode });
    const over = new Promise<void>((resolve) => {
      this.#onLeft = () => {
        if (this.#refused.size === 0 && !this.members.others.some(({ present }) => present)) resolve();
      };
      this.#onLeft();
    });
    await within(over, BYE_MS);
    this.#server.close();
  }

  async #listen(): Promise<void> {
    for await (const from of this.#server.messages()) {
      try {
        this.#hear(from);
      } catch (error) {
        this.#broken?.(error as Error);
      }
    }
  }

  #hear({ node, message }: FromNode): void {
    const known = this.members.get(node);
    if (known) Object.assign(known, { heardAt: performance.now(), unreached: 0 });
    switch (message.type) {
      case 'hello':
        this.#welcome(node, message);
        return;
      case 'heartbeat':
        return;
      case 'started':
        if (this.#isOn(node, message)) this.#ranks.get(message.rank)!.process.pid = message.pid;
        return;
      case 'exit':
        if (this.#isOn(node, message)) {
          const { code, signal, tail } = message;
          this.#ranks.get(message.rank)!.process.ended(code, signal as NodeJS.Signals | null, tail);
        }
        return;
      case 'leaving':
        if (this.#refused.delete(node)) this.#onLeft?.();
        this.#lose(node, message.why);
        return;
    }
  }

  /** It speaks of a rank that lives there, of the run that is on. */
  #isOn(node: number, { rank, launch }: { rank: number; launch: string }): boolean {
    const known = this.#ranks.get(rank);
    return known?.node === node && known.launch === launch;
  }

  #welcome(node: number, { type: _, nodes, ...facts }: NodeAbout & { type: 'hello' }): void {
    const before = this.members.get(node);
    if (before?.present && before.pid !== facts.pid) {
      this.#lose(node, `another process came as node ${node}: each needs a --node-rank of its own`);
    }
    const problem = this.#mismatch(node, nodes, facts);
    if (problem) {
      this.#refused.add(node);
      this.#tell(node, { type: 'refused', why: problem.text });
      throw problem;
    }
    this.#refused.delete(node);
    this.members.join(node, facts);
    this.#tell(node, { type: 'welcome' });
    log.info(`node ${node} of ${this.place.nodes}: ${facts.host}, ${facts.ranks} x ${facts.device}`);
    this.#onPresent?.();
  }

  #mismatch(node: number, nodes: number, facts: NodeFacts): (Error & { text: string }) | null {
    const { own } = this.members;
    if (nodes !== this.place.nodes)
      return fail('TP_NODE_MISMATCH', node, '--nnodes', String(nodes), String(this.place.nodes));
    for (const [key, what] of [
      ['version', 'tp-run'],
      ['device', 'device'],
      ['model', 'another model:'],
    ] as const) {
      if (facts[key] !== own[key]) return fail('TP_NODE_MISMATCH', node, what, facts[key], own[key]);
    }
    return null;
  }

  #look(): void {
    const now = performance.now();
    const asleep = now - this.#lookedAt > 4 * HEARTBEAT_MS;
    this.#lookedAt = now;
    for (const node of this.members.others) {
      if (!node.present) continue;
      // this process was held up: it cannot say who was silent meanwhile
      if (asleep) node.heardAt = now;
      const silent = now - node.heardAt;
      if (silent > this.place.nodeTimeoutMs) {
        this.#lose(node.node, node.unreached > 0 ? CLOSED : silence(silent));
        continue;
      }
      this.#server.send(node.node, { type: 'heartbeat' }).catch(() => {
        if (++node.unreached < 2 || !node.present) return;
        this.#lose(node.node, CLOSED);
      });
    }
  }

  #lose(node: number, how: string): void {
    const lost = this.members.get(node);
    if (!lost?.present) return;
    lost.present = false;
    this.#onLeft?.();
    if (!this.#onLeft && !this.#loseRanks(lost, how)) log.warn(`node ${node} on ${lost.host}: ${how}`);
  }

  /** False when no rank of a run lives there. */
  #loseRanks({ node, host }: Member, how: string): boolean {
    const ranks = [...this.#ranks].filter(([, on]) => on.node === node && on.process.exit === null);
    for (const [, { process }] of ranks) process.lose();
    if (ranks.length === 0) return false;
    this.onLost(
      fail('TP_NODE_LOST', `node ${node} on ${host}`, how),
      ranks.map(([rank]) => rank),
    );
    return true;
  }

  #tell(node: number, message: Parameters<NodeServer['send']>[1]): void {
    this.#server.send(node, message).catch((error: Error) => log.debug(`node ${node}: ${error.message}`));
  }
}
