// What the installed ZeroMQ is and can do.

import { capability, version } from 'zeromq';

/** libzmq's version and the names of its optional parts, `curve` for encryption. */
export function zeromqFacts(): { version: string; capabilities: string[] } {
  const capabilities = Object.entries(capability).filter(([, has]) => has);
  return { version, capabilities: capabilities.map(([name]) => name).sort() };
}
