// Sums and gathers between ranks: what every collective promises, and which one a run uses.

import { fail } from '../errors.js';

/** All ranks make the same calls in the same order, and all end with the same bits. */
export interface Collective {
  readonly name: CollectiveName;
  /** The number of the next operation, from 1, by which errors name it. */
  readonly next: number;
  /**
   * Replaces `buffer` by its fp32 sum over all ranks. Ranks meet in a balanced binary tree, neighbours first:
   * ((r0 + r1) + (r2 + r3)) + ..., which is the upper part of the tree that each rank began over its own leaves.
   */
  allReduce(buffer: Float32Array): Promise<void>;
  /** Fills `gathered` with every rank's `send`, rank-major: gathered.length = ranks * send.length. */
  gather(send: Float32Array, gathered: Float32Array): Promise<void>;
  /** From now on a partner that stays away for `timeoutMs` is TP_COLLECTIVE_TIMEOUT; before, waiting has no end. */
  limit(timeoutMs: number): void;
  /** The operation under way and whom it waits for; a launcher asks this of a silent rank. */
  pending(): { op: string; partner: number } | null;
  close(): void;
}

export type CollectiveName = 'peer' | 'nccl' | 'zmq' | 'local';

/** What the choice depends on. */
export interface Topology {
  ranks: number;
  device: 'cpu' | 'cuda';
  /** GPU of each rank; [] on the CPU. */
  devices: readonly number[];
  /** Machines that the ranks are spread over; of one that shows its nodes different GPUs, each counts. */
  hosts: number;
}

/** What only GPUs have: asked when a run is to use them. */
export interface GpuFacts {
  /** By device index: the devices whose memory each can reach. */
  peers: readonly (readonly number[])[];
  /** Why that is not to be used, or null. */
  peersOff: string | null;
  /** Why libnccl.so.2 cannot be used, or null. */
  ncclWhy: string | null;
}

/** `true`, or a sentence that says why not. */
type Supports = (topology: Topology, gpus: () => GpuFacts) => true | string;

/** One host's GPUs that reach each other's memory; ranks may share a GPU. */
const peerSupports: Supports = ({ device, devices, hosts }, gpus) => {
  if (device === 'cpu') return 'no GPU';
  // docs/several-hosts.md: why not peer inside each host and NCCL between them
  if (hosts > 1) return `${hosts} hosts, and one collective joins all ranks`;
  const { peers, peersOff } = gpus();
  if (peersOff !== null) return peersOff;
  for (const a of devices)
    for (const b of devices)
      if (a !== b && !peers[a]?.includes(b)) return `GPU ${a} and ${b} have no P2P access`;
  return true;
};

const ncclSupports: Supports = ({ device, devices, hosts }, gpus) => {
  if (device === 'cpu') return 'no GPU';
  // over several hosts a device number says nothing of another host's: NCCL itself refuses a GPU it meets twice
  if (hosts === 1 && new Set(devices).size < devices.length) return 'ranks share a GPU';
  return gpus().ncclWhy ?? true;
};

/** Best first. */
const COLLECTIVES: readonly { name: CollectiveName; supports: Supports }[] = [
  { name: 'local', supports: ({ ranks }) => ranks === 1 || 'several ranks' },
  { name: 'peer', supports: peerSupports },
  { name: 'nccl', supports: ncclSupports },
  {
    name: 'zmq',
    supports: ({ ranks }) => Number.isInteger(Math.log2(ranks)) || `${ranks} is no power of two`,
  },
];

export interface Choice {
  name: CollectiveName;
  /** One line for the log: `zmq (peer off: no GPU; nccl off: no GPU)`. */
  why: string;
}

/** The collective of a run; TP_COLLECTIVE_UNSUPPORTED when the one asked for cannot work here. */
export function chooseCollective(
  wanted: 'auto' | CollectiveName,
  topology: Topology,
  gpus: () => GpuFacts = () => ({ peers: [], peersOff: null, ncclWhy: 'no GPU' }),
): Choice {
  const answers = COLLECTIVES.map(({ name, supports }) => ({ name, answer: supports(topology, gpus) }));
  if (wanted !== 'auto') {
    const answer = answers.find(({ name }) => name === wanted)!.answer;
    if (answer !== true) throw fail('TP_COLLECTIVE_UNSUPPORTED', wanted, answer);
    return topology.ranks === 1
      ? { name: 'local', why: 'local (one rank)' }
      : { name: wanted, why: `${wanted} (asked for)` };
  }
  const best = answers.findIndex(({ answer }) => answer === true);
  if (best < 0) throw fail('TP_COLLECTIVE_UNSUPPORTED', 'zmq', answers.at(-1)!.answer as string);
  const { name } = answers[best]!;
  if (name === 'local') return { name, why: 'local (one rank)' };
  const others = answers.slice(1, best).map((other) => `${other.name} off: ${other.answer}`);
  return { name, why: others.length ? `${name} (${others.join('; ')})` : name };
}
