// Keys of encrypted sockets (CURVE, Curve25519). Who holds the cluster's secret can derive the keys that nodes meet
// with; what a run uses after that is made fresh for it and handed out over that meeting.

import { createPrivateKey, createPublicKey, hkdfSync } from 'node:crypto';
import { curveKeyPair } from 'zeromq';

/** Z85 text of 40 characters each, as libzmq takes them. */
export interface KeyPair {
  publicKey: string;
  secretKey: string;
}

/** What a socket that binds shows and whom it lets in. */
export interface ServerKeys {
  own: KeyPair;
  /** Public keys of those who may connect. */
  clients: readonly string[];
}

/** What a socket that connects shows and whom it expects. */
export interface ClientKeys {
  own: KeyPair;
  server: string;
}

/** The keys of one rank in one run. */
export interface RankKeys {
  own: KeyPair;
  /** Public key of the launcher's control socket. */
  launcher: string;
  /** Public keys of all ranks, by rank. */
  ranks: readonly string[];
}

/** Keys of one run: the launcher's, and a pair for each rank. */
export interface RunKeys {
  launcher: KeyPair;
  ranks: readonly KeyPair[];
}

export const SECRET_BYTES = 32;

export function newKeyPair(): KeyPair {
  return curveKeyPair();
}

/** Fresh keys for one run. */
export function newRunKeys(ranks: number): RunKeys {
  return { launcher: newKeyPair(), ranks: Array.from({ length: ranks }, newKeyPair) };
}

/** What rank `rank` gets of a run's keys. */
export function keysOf(keys: RunKeys | null, rank: number): RankKeys | null {
  if (!keys) return null;
  const { launcher, ranks } = keys;
  return {
    own: ranks[rank]!,
    launcher: launcher.publicKey,
    ranks: ranks.map(({ publicKey }) => publicKey),
  };
}

/** The key pair that holders of `secret` (32 bytes) agree on for `role`, such as `node 1`. */
export function deriveKeyPair(secret: Buffer, role: string): KeyPair {
  const seed = Buffer.from(hkdfSync('sha256', secret, 'tp-run/1', role, 32));
  return { publicKey: z85(publicKeyOf(seed)), secretKey: z85(seed) };
}

/** DER around a raw X25519 private key (RFC 8410). */
const PKCS8_X25519 = Buffer.from('302e020100300506032b656e04220420', 'hex');

function publicKeyOf(seed: Buffer): Buffer {
  const der = Buffer.concat([PKCS8_X25519, seed]);
  const privateKey = createPrivateKey({ key: der, format: 'der', type: 'pkcs8' });
  return createPublicKey(privateKey).export({ format: 'der', type: 'spki' }).subarray(-32);
}

const Z85 = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#';

/** ZeroMQ's base 85 (RFC 32); `bytes` come in fours. */
export function z85(bytes: Uint8Array): string {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let text = '';
  for (let at = 0; at < bytes.length; at += 4) {
    const word = view.getUint32(at);
    for (let power = 85 ** 4; power >= 1; power /= 85) text += Z85[Math.floor(word / power) % 85];
  }
  return text;
}
