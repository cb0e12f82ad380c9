export const PARTS: readonly string[];
export function obstacle(): string | undefined;
export function build(options?: { undefinedBehaviour?: boolean }): string;
export function run(program: string, args: readonly string[]): Promise<{ status: number | string | null; output: string }>;
export function share(jobs: readonly (() => Promise<void>)[], together: number): Promise<void>;
