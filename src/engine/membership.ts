// The nodes of a run: what each has said of itself, and which ranks live where. Ranks fill the nodes in order.

import type { NodeAbout } from '../comm/node-messages.js';

/** A node's account of itself, without its place. */
export type NodeFacts = Omit<NodeAbout, 'node' | 'nodes'>;

export interface Member extends NodeFacts {
  node: number;
  present: boolean;
  heardAt: number;
  /** Heartbeats in a row that could not be sent to it: 1 may be a node that is coming back. */
  unreached: number;
}

/** What asks about ranks is asked when every node has come. */
export class Membership {
  readonly own: NodeFacts;
  readonly #members: (Member | undefined)[];

  /** `nodes` in all; `own` is node 0. */
  constructor(nodes: number, own: NodeFacts) {
    this.own = own;
    this.#members = [memberOf(0, own, 0), ...Array<undefined>(nodes - 1)];
  }

  /** The latest account of `node`, which is there. */
  join(node: number, facts: NodeFacts): void {
    this.#members[node] = memberOf(node, facts, performance.now());
  }

  get(node: number): Member | undefined {
    return this.#members[node];
  }

  /** The other nodes that have ever come. */
  get others(): Member[] {
    return this.#members.slice(1).filter((member) => member !== undefined);
  }

  /** Nodes that are not there. */
  get missing(): number[] {
    return [...this.#members.keys()].filter((node) => !this.#members[node]?.present);
  }

  /** Ranks of all nodes. */
  get ranks(): number {
    return this.#members.reduce((sum, member) => sum + (member?.ranks ?? 0), 0);
  }

  /** Device index of each of the first `ranks` ranks; [] on CPUs. */
  devices(ranks: number): number[] {
    return this.#members.flatMap((member) => member?.devices ?? []).slice(0, ranks);
  }

  /** Ranks of a run of `ranks` that live on node 0. */
  ownRanks(ranks: number): number {
    return Math.min(ranks, this.own.ranks);
  }

  /** Machines that a run of `ranks` is spread over. */
  hosts(ranks: number): number {
    return new Set(Array.from({ length: ranks }, (_, rank) => this.of(rank).hostId)).size;
  }

  firstRank(node: number): number {
    return this.#members.slice(0, node).reduce((sum, before) => sum + before!.ranks, 0);
  }

  /** The node on which `rank` lives. */
  of(rank: number): Member {
    return this.#members.find((member) => rank < this.firstRank(member!.node) + member!.ranks)!;
  }
}

function memberOf(node: number, facts: NodeFacts, heardAt: number): Member {
  return { ...facts, node, present: true, heardAt, unreached: 0 };
}
