// Who may connect to an encrypted socket of this process. CURVE alone lets in every client that knows the server's
// public key; ZAP (RFC 27) asks here about the client's own.

import { Reply, type Socket } from 'zeromq';
import { log, sparingly } from '../log.js';
import { type ClientKeys, type ServerKeys, z85 } from './curve.js';

/** Where libzmq asks; one per process. */
const ZAP = 'inproc://zeromq.zap.01';
/** A connection that has not shown its key by then is closed, in ms. */
const HANDSHAKE_MS = 5000;

/** Allow-lists by domain, one domain per bound socket. */
const lists = new Map<string, ReadonlySet<string>>();
let asked: Reply | null = null;
/** Nobody may listen before libzmq can ask: without an answerer it lets everybody in. */
let answering: Promise<void> = Promise.resolve();
let domains = 0;
const unknownKey = sparingly((text) => log.warn(text), 1);

/** Options of a socket that binds; null keys = plain. Call `dismiss` with the same options when it closes. */
export async function serverOptions(keys: ServerKeys | null): Promise<GuardedOptions> {
  if (keys === null) return { handshakeInterval: HANDSHAKE_MS };
  await guard();
  const zapDomain = `tp-run-${domains++}`;
  lists.set(zapDomain, new Set(keys.clients));
  return {
    handshakeInterval: HANDSHAKE_MS,
    curveServer: true,
    curveSecretKey: keys.own.secretKey,
    zapDomain,
  };
}

export interface GuardedOptions {
  handshakeInterval: number;
  curveServer?: true;
  curveSecretKey?: string;
  zapDomain?: string;
}

/** Options of a socket that connects; null keys = plain. */
export function clientOptions(keys: ClientKeys | null): object {
  if (keys === null) return { handshakeInterval: HANDSHAKE_MS };
  const { own, server } = keys;
  return {
    handshakeInterval: HANDSHAKE_MS,
    curvePublicKey: own.publicKey,
    curveSecretKey: own.secretKey,
    curveServerKey: server,
  };
}

/** Forgets a closed socket's allow-list; the last one ends the gatekeeper, which would keep the process alive. */
export function dismiss({ zapDomain }: GuardedOptions): void {
  if (zapDomain === undefined || !lists.delete(zapDomain) || lists.size > 0) return;
  asked?.close();
  asked = null;
}

/**
 * Says which connections over a network were refused before they could say anything. At most one line a second. On ipc
 * there is nothing to tell: only this user gets there, and its next run looks whether anybody listens.
 */
export function logRefusals(socket: Socket, endpoint: string, what: string): void {
  if (!endpoint.startsWith('tcp:')) return;
  const say = sparingly((text) => log.warn(text), 1);
  const refused = ({ address, error }: { address: string; error: Error }) =>
    say(`${what}: a connection to ${address} was refused: ${error.message}`);
  socket.events.on('handshake:error:protocol', refused);
  socket.events.on('handshake:error:auth', refused);
  socket.events.on('handshake:error:other', refused);
}

function guard(): Promise<void> {
  if (asked) return answering;
  const socket = new Reply({ linger: 0 });
  asked = socket;
  answering = socket.bind(ZAP).then(() => {
    answer(socket).catch((error: Error) => log.error(`nobody can be let in any more: ${error.message}`));
  });
  return answering;
}

/** Frames of a question: version, request, domain, address, identity, mechanism, client's public key (32 bytes). */
async function answer(socket: Reply): Promise<void> {
  while (!socket.closed) {
    try {
      const [version, request, domain, address, , mechanism, key] = await socket.receive();
      const list = lists.get(String(domain));
      const known = String(mechanism) === 'CURVE' && key?.length === 32 && list?.has(z85(key));
      if (!known)
        unknownKey(`an unknown key was refused: ${key?.length === 32 ? z85(key) : 'none'} from ${address}`);
      await socket.send([version!, request!, known ? '200' : '400', known ? 'OK' : 'unknown key', '', '']);
    } catch (error) {
      if (!socket.closed) throw error;
    }
  }
}
