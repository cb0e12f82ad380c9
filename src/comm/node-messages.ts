// What the nodes of a run say to each other, a node being one `tp-run` process that someone started: node 0 leads, the
// others start ranks for it. Like all messages a closed union, checked on arrival; none names a file.

import { z } from 'zod';
import { decode, head, type Words } from './messages.js';

const count = z.number().int().nonnegative();
const key = z.string().length(40);
const keyPair = z.strictObject({ publicKey: key, secretKey: key });
const signal = z.enum(['SIGTERM', 'SIGKILL', 'SIGINT', 'SIGHUP']);

/** A node's account of itself. */
const about = {
  node: count,
  nodes: count,
  host: z.string().max(256),
  /** Equal for nodes on one machine that number its GPUs alike. */
  hostId: z.string().max(256),
  pid: count,
  version: z.string().max(64),
  ranks: count.min(1).max(64),
  device: z.enum(['cpu', 'cuda']),
  devices: z.array(count).max(64),
  /** Digest of the model's shape and seed: all nodes must mean the same one. */
  model: z.string().max(128),
};

const FOLLOWER = z.discriminatedUnion('type', [
  z.strictObject({ ...head, type: z.literal('hello'), ...about }),
  z.strictObject({ ...head, type: z.literal('heartbeat') }),
  z.strictObject({ ...head, type: z.literal('started'), launch: z.string(), rank: count, pid: count }),
  z.strictObject({
    ...head,
    type: z.literal('exit'),
    launch: z.string(),
    rank: count,
    code: z.number().int().nullable(),
    signal: z.string().max(16).nullable(),
    tail: z.array(z.string()).max(64),
  }),
  /** It ends: someone stopped it, or it cannot go on. */
  z.strictObject({ ...head, type: z.literal('leaving'), why: z.string() }),
]);

const LEADER = z.discriminatedUnion('type', [
  z.strictObject({ ...head, type: z.literal('welcome') }),
  z.strictObject({ ...head, type: z.literal('refused'), why: z.string() }),
  z.strictObject({ ...head, type: z.literal('heartbeat') }),
  z.strictObject({
    ...head,
    type: z.literal('start'),
    /** Run id of the ranks. */
    launch: z.string().regex(/^[0-9a-f]{1,64}$/),
    control: z.string().max(256),
    first: count,
    ranks: count,
    /** Keys of the ranks of this node, in order; null = plain sockets. */
    keys: z
      .strictObject({ launcher: key, ranks: z.array(key).max(4096), own: z.array(keyPair).max(64) })
      .nullable(),
  }),
  z.strictObject({ ...head, type: z.literal('kill'), launch: z.string(), rank: count, signal }),
  z.strictObject({ ...head, type: z.literal('bye'), exitCode: count.max(255) }),
]);

export type FollowerMessage = Words<z.infer<typeof FOLLOWER>>;
export type LeaderMessage = Words<z.infer<typeof LEADER>>;
export type NodeAbout = Omit<FollowerMessage & { type: 'hello' }, 'type'>;

/** A follower's message with the session that it belongs to: '' before the first welcome. TP_MESSAGE_BAD, TP_PROTOCOL. */
export function decodeFollower(bytes: Uint8Array, from: string): FollowerMessage & { run: string } {
  return decode(FOLLOWER, null, bytes, from);
}

export function decodeLeader(bytes: Uint8Array): LeaderMessage & { run: string } {
  return decode(LEADER, null, bytes, 'node 0');
}
